/* The survey: one stop before a dump, to see what of the heap must stay.
 *
 * Moves nothing.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

struct survey {
	struct sn_session *session;
	struct sn_survey_report *ret;
	int mem_fd;
};

static void look(void *arg)
{
	const struct survey *survey = arg;
	struct sn_session *session = survey->session;
	struct sn_survey_report *ret = survey->ret;
	uint64_t began = now_ns();

	ret->outcome = stop_begin(session->stop, atomic_load(&session->pid), session->agent_tids);
	ret->cause = stop_cause(session->stop);
	if (ret->outcome == SN_MOVED) {
		ret->cause = robust_look(session, survey->mem_fd);
		if (ret->cause)
			ret->outcome = SN_BUSY;
		ret->nthreads = stop_places(session->stop, ret->threads, MAX_THREADS);
		ret->nkept = robust_pages(session->robust, ret->kept, MAX_KEPT);
	}
	stop_end(session->stop);
	ret->stop_ns = now_ns() - began;
	robust_fill(session);
}

void sn_survey(struct sn_session *session, struct sn_survey_report *ret)
{
	struct survey survey = {session, ret, -1};
	char path[32];
	int error;

	ret->nthreads = ret->nkept = 0;
	ret->stop_ns = 0;
	pthread_mutex_lock(&session->mover);
	snprintf(path, sizeof(path), "/proc/%d/mem", atomic_load(&session->pid));
	survey.mem_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (survey.mem_fd < 0)
		error = errno;
	else
		error = session_stop(session) ? stop_run(session->stop, look, &survey) : ENOMEM;
	if (error) {
		ret->outcome = error == ENOENT || error == ESRCH ? SN_GONE : SN_FAILED;
		ret->cause = -error;
	}
	if (survey.mem_fd >= 0)
		close(survey.mem_fd);
	pthread_mutex_unlock(&session->mover);
}
