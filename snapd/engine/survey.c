/* The survey: one stop before a dump, to see what of the heap must stay.
 *
 * Moves nothing.
 */
#include "internal.h"

#include <errno.h>

struct survey {
	struct sn_session *session;
	bool patient;
	struct sn_survey_report *ret;
};

static void look(void *arg)
{
	const struct survey *survey = arg;
	struct sn_session *session = survey->session;
	struct sn_survey_report *ret = survey->ret;
	uint64_t began = now_ns();

	ret->outcome = stop_begin(session->stop, atomic_load(&session->pid), session->agent_tids, survey->patient);
	ret->cause = stop_cause(session->stop);
	if (ret->outcome == SN_MOVED) {
		ret->cause = robust_look(session);
		if (ret->cause)
			ret->outcome = SN_BUSY;
		ret->nthreads = stop_places(session->stop, ret->threads, MAX_THREADS);
		ret->nkept = robust_pages(session->robust, ret->kept, MAX_KEPT);
	}
	stop_end(session->stop);
	ret->stop_ns = now_ns() - began;
	robust_fill(session);
}

void sn_survey(struct sn_session *session, bool patient, struct sn_survey_report *ret)
{
	struct survey survey = {session, patient, ret};
	int error;

	ret->nthreads = ret->nkept = 0;
	ret->stop_ns = 0;
	pthread_mutex_lock(&session->mover);
	error = -memory_open(session);
	if (!error)
		error = session_stop(session) ? stop_run(session->stop, look, &survey) : ENOMEM;
	if (error) {
		ret->outcome = error == ESRCH ? SN_GONE : SN_FAILED;
		ret->cause = -error;
	}
	pthread_mutex_unlock(&session->mover);
}
