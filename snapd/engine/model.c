/* Doors for tests: a page map without a target, driven by synthetic events.
 *
 * The stateful test compares what the real code makes of any order of events with a plain model. Nothing here is
 * used by the daemon. */
#include "internal.h"

#include <errno.h>

int sn_model_add(struct sn_session *session, uint64_t start, uint64_t npages, uint64_t entry)
{
	struct page_map *pm = &session->pm;
	struct table *table;
	uint64_t first;
	int error;

	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(pm);
	error = pm_alloc(pm, npages, &first);
	for (uint64_t i = 0; i < npages && !error; i++)
		entry_put(session, first + i, entry + (i << 18));
	if (!error)
		error = pm_insert(table, (struct record){start, npages, first, 0});
	pm_commit(pm, pm_applied(pm));
	pthread_rwlock_unlock(&session->lock);
	return error;
}

void sn_model_event(struct sn_session *session, int event, uint64_t a, uint64_t b, uint64_t c)
{
	session->pm.ring[session->model_events++] =
		(struct snapd_uffd_msg){.event = (__u8)event, .arg.words = {a, b, c}};
}

void sn_model_apply(struct sn_session *session)
{
	pthread_rwlock_wrlock(&session->lock);
	events_apply(session, session->model_events);
	memset(session->pm.ring, 0, session->model_events * sizeof(session->pm.ring[0]));
	session->model_events = 0;
	pthread_rwlock_unlock(&session->lock);
}

void sn_model_owe(struct sn_session *session, uint64_t start, uint64_t end)
{
	pthread_rwlock_wrlock(&session->lock);
	pm_add_debt(pm_edit(&session->pm), start, end);
	pm_commit(&session->pm, pm_applied(&session->pm));
	pthread_rwlock_unlock(&session->lock);
}

void sn_model_stand(struct sn_session *session)
{
	pthread_rwlock_wrlock(&session->lock);
	pm_edit(&session->pm)->ndebts = 0;
	pm_commit(&session->pm, pm_applied(&session->pm));
	pthread_rwlock_unlock(&session->lock);
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
