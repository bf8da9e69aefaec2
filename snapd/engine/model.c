/* Doors for tests: a page map without a target, driven by synthetic events.
 *
 * The stateful test compares what the real code makes of any order of events with a plain model. Nothing here is
 * used by the daemon. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>

int sn_model_add(struct sn_session *session, uint64_t start, uint64_t npages, uint64_t entry)
{
	struct page_map *pm = &session->pm;
	struct table *table;
	uint64_t first;
	int error;

	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(pm);
	first = NO_ENTRIES;
	error = entry == ~0ULL ? 0 : pm_alloc(pm, npages, &first);
	for (uint64_t i = 0; i < npages && first != NO_ENTRIES && !error; i++) {
		uint64_t one = entry_has_frame(entry) ? entry + (i << 18) : entry;

		store_hold_entry(session->store, one);
		entry_put(session, first + i, one);
	}
	if (!error)
		error = pm_insert(table, (struct record){start, npages, first, 0});
	pm_commit(pm);
	pthread_rwlock_unlock(&session->lock);
	return error;
}

void sn_model_skip(struct sn_session *session, uint64_t nentries)
{
	session->pm.alloc_next += nentries;
}

int sn_model_event(struct sn_session *session, int event, uint64_t a, uint64_t b, uint64_t c, uint32_t npages_more,
		   uint64_t *ret_need)
{
	struct interval need;

	if (!session->model) {
		session->model = malloc(sizeof(*session->model));
		if (!session->model)
			return -ENOMEM;
		events_begin(session->model, session);
	}
	pm_ring(&session->pm)[session->model->n] =
		(struct snapd_uffd_msg){.event = (__u8)event, .reserved3 = npages_more, .arg.words = {a, b, c}};
	events_take(session->model);
	need = events_need(session->model);
	ret_need[0] = need.start;
	ret_need[1] = need.end;
	return need.end != 0;
}

int sn_model_force(struct sn_session *session)
{
	events_force(session->model);
	return events_need(session->model).end != 0;
}

void sn_model_end(struct sn_session *session, int quiet)
{
	if (session->model)
		events_end(session->model, quiet);
	free(session->model);
	session->model = NULL;
}

void sn_model_compact(struct sn_session *session)
{
	if (session->model)
		events_compact(session->model);
}

void sn_model_drop(struct sn_session *session, uint64_t start, uint64_t end)
{
	pm_set_dropping(&session->pm, (struct interval){start, end});
}

void sn_model_stand(struct sn_session *session)
{
	pthread_rwlock_wrlock(&session->lock);
	pm_edit(&session->pm)->ndebts = 0;
	pm_commit(&session->pm);
	pthread_rwlock_unlock(&session->lock);
}

void sn_model_trouble(struct sn_session *session, int cause)
{
	if (cause)
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = cause});
	else
		session_gone(session);
}

uint64_t sn_model_entry(struct sn_session *session, uint64_t address)
{
	const struct table *table;
	uint64_t entry = ~0ULL;
	long i;

	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	i = pm_find(table, address);
	if (i >= 0 && table->records[i].first != NO_ENTRIES)
		entry = session->pm.entries[table->records[i].first + (address - table->records[i].start) / PAGE];
	pthread_rwlock_unlock(&session->lock);
	return entry;
}
