/* The engine's start, its housekeeping, and the codec's raw speed.
 *
 * Knows no target.
 */
#include "internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

int cpus(void)
{
	cpu_set_t set;

	return sched_getaffinity(0, sizeof(set), &set) ? 1 : CPU_COUNT(&set);
}

int sn_init(const struct sn_codec *codec, int npackers)
{
	int fd;

	frame_use_codec(codec);
	fd = sn_notice_fd();
	if (fd < 0)
		return fd;
	awake_start();
	return pack_start(npackers);
}

void sn_page_map_trim(struct sn_session *session)
{
	struct record *used = malloc(MAX_RECORDS * sizeof(*used));
	struct table *table;
	uint64_t n = 0;

	if (!used)
		return;
	pthread_rwlock_wrlock(&session->lock);
	for (int i = 0; i < MAX_INFLIGHT; i++)
		if (session->inflight[i]) /* its entries may be in no record any more and still be looked at */
			goto out;
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++)
		if (table->records[i].first != NO_ENTRIES)
			used[n++] = table->records[i];
	pm_trim(&session->pm, used, n);
out:
	pthread_rwlock_unlock(&session->lock);
	free(used);
}

struct codec_job {
	const unsigned char *pages;
	uint64_t npages, bytes;
	int level;
	struct sn_store store;
	unsigned char *frames;
	uint32_t *lengths;
	struct frame_packer *packer;
	struct frame_opener *opener;
	int error;
};

static void *compress_job(void *arg)
{
	struct codec_job *job = arg;

	job->bytes = 0;
	for (uint64_t i = 0; i < job->npages; i++) {
		job->lengths[i] = frame_pack(job->packer, job->level, job->pages + i * PAGE, job->frames + job->bytes);
		frame_seal(&job->store, job->bytes, job->frames + job->bytes);
		job->bytes += job->lengths[i];
	}
	return NULL;
}

static void *decompress_job(void *arg)
{
	struct codec_job *job = arg;
	unsigned char page[PAGE];
	uint64_t at = 0;

	for (uint64_t i = 0; i < job->npages; i++) {
		if (frame_open(job->opener, &job->store, at, job->frames + at, job->lengths[i], page) != FRAME_OK)
			job->error = -EILSEQ;
		at += job->lengths[i];
	}
	return NULL;
}

static int run_jobs(struct codec_job *jobs, int n, void *(*work)(void *), uint64_t *ret_ns)
{
	pthread_t threads[64];
	uint64_t began = now_ns();
	int started = 0, error = 0;

	for (; started < n && !error; started++)
		error = pthread_create(&threads[started], NULL, work, &jobs[started]);
	for (int i = 0; i < started - (error != 0); i++)
		pthread_join(threads[i], NULL);
	*ret_ns = now_ns() - began;
	return -error;
}

int sn_bench_codec(const unsigned char *pages, uint64_t npages, int level, int nthreads, uint64_t *ret_compress_ns,
		   uint64_t *ret_decompress_ns, uint64_t *ret_bytes)
{
	struct codec_job *jobs = calloc((size_t)nthreads, sizeof(*jobs));
	uint64_t each = (npages + (uint64_t)nthreads - 1) / (uint64_t)nthreads;
	int error = jobs && nthreads <= 64 ? 0 : -ENOMEM;

	*ret_bytes = 0;
	for (int i = 0; i < nthreads && !error; i++) {
		uint64_t from = min_u64((uint64_t)i * each, npages);

		jobs[i].pages = pages + from * PAGE;
		jobs[i].npages = min_u64(each, npages - from);
		jobs[i].level = level;
		jobs[i].frames = malloc(jobs[i].npages * (FRAME_MAX + 8) + PAGE);
		jobs[i].lengths = malloc((jobs[i].npages + 1) * sizeof(uint32_t));
		jobs[i].packer = frame_packer_create();
		jobs[i].opener = frame_opener_create();
		if (!jobs[i].frames || !jobs[i].lengths || !jobs[i].packer || !jobs[i].opener)
			error = -ENOMEM;
	}
	if (!error)
		error = run_jobs(jobs, nthreads, compress_job, ret_compress_ns);
	if (!error)
		error = run_jobs(jobs, nthreads, decompress_job, ret_decompress_ns);
	for (int i = 0; jobs && i < nthreads; i++) {
		*ret_bytes += jobs[i].bytes;
		error = error ? error : jobs[i].error;
		free(jobs[i].frames);
		free(jobs[i].lengths);
		frame_packer_destroy(jobs[i].packer);
		frame_opener_destroy(jobs[i].opener);
	}
	free(jobs);
	return error;
}
