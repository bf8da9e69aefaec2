/* Memory that devices write while the program runs: io_uring fixed buffers in the middle of a heap, io_uring reads and
 * writes in flight, and O_DIRECT reads of other threads. The file's content changes all the time; every page read is
 * verified, and what was written from the heap is read back. A wrong byte is one line on stderr and exit status 1.
 *
 *   pins [--seconds 10] [--mib 64] [--dir DIR] [--pace US] [--threads 1] [--seed 1]
 *
 * The file is nameless, in --dir (default $TMPDIR or /tmp). One JSON line at the end; without io_uring the line has
 * "skipped" and the exit status is 77. SIGTERM and SIGINT end it early and orderly. */
#include "content.h"
#include "ring.h"
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>

#define FIXED_PAGES 8
#define DEPTH 16        /* transfers in flight, each of one page */
#define THREAD_PAGES 32 /* of the file, for each O_DIRECT thread */
#define MAX_THREADS 8
#define SKIPPED 77

/* Pages of the heap that one party alone uses, and its pages of the file. */
struct part {
    pthread_t thread;
    uint32_t first, npages; /* of the heap */
    uint32_t file_first;
    struct rng rng;
    struct identity in_file[THREAD_PAGES];
    uint64_t reads, writes;
};

static struct heap heap;
static atomic_uint newest = 1; /* the newest generation given out by any thread */
static int file_fd;
static bool direct = true;
static unsigned pace_us;
static atomic_bool stop;
static struct ring ring;
static struct part fixed, async, threads[MAX_THREADS];

static char *page_at(uint32_t page)
{
    return heap.at + page * PAGE;
}

static off_t file_at(uint32_t page)
{
    return (off_t)(page * PAGE);
}

static uint32_t random_page(struct part *part)
{
    return part->first + (uint32_t)rng_below(&part->rng, part->npages);
}

static void renew(uint32_t page)
{
    heap.identity[page] = (struct identity){.index = page, .generation = atomic_fetch_add(&newest, 1) + 1};
    fill_page(page_at(page), heap.seed, heap.identity[page]);
}

static void pace(void)
{
    if (pace_us)
        sleep_ns(pace_us * 1000ull);
}

static void expect_length(const char *what, ssize_t got, size_t wanted)
{
    if (got != (ssize_t)wanted)
        fail("FAILED %s gave %zd of %zu", what, got, wanted);
}

static void transfer_fixed(uint8_t opcode, const char *what)
{
    ring_prepare(&ring, opcode, file_fd, page_at(fixed.first), FIXED_PAGES * PAGE, (uint64_t)file_at(fixed.file_first),
                 0);
    ring_enter(&ring, 0);
    heap_verify_page(&heap, random_page(&async), what);
    expect_length(what, ring_take(&ring).result, FIXED_PAGES * PAGE);
}

/* The program changes the file by another buffer; the device then writes the registered pages. */
static void read_fixed(char *other)
{
    for (uint32_t i = 0; i < FIXED_PAGES; i++) {
        heap.identity[fixed.first + i] =
            (struct identity){.index = i, .generation = atomic_fetch_add(&newest, 1) + 1};
        fill_page(other + i * PAGE, heap.seed, heap.identity[fixed.first + i]);
    }
    expect_length("pwrite", pwrite(file_fd, other, FIXED_PAGES * PAGE, file_at(fixed.file_first)), FIXED_PAGES * PAGE);
    pace();
    transfer_fixed(IORING_OP_READ_FIXED, "READ_FIXED");
    for (uint32_t i = 0; i < FIXED_PAGES; i++)
        heap_verify_page(&heap, fixed.first + i, "READ_FIXED");
    fixed.reads++;
}

/* The program changes the registered pages; the device must read what the program wrote. */
static void write_fixed(char *other)
{
    for (uint32_t i = 0; i < FIXED_PAGES; i++) {
        heap_verify_page(&heap, fixed.first + i, "waiting");
        renew(fixed.first + i);
    }
    pace();
    transfer_fixed(IORING_OP_WRITE_FIXED, "WRITE_FIXED");
    expect_length("pread", pread(file_fd, other, FIXED_PAGES * PAGE, file_at(fixed.file_first)), FIXED_PAGES * PAGE);
    for (uint32_t i = 0; i < FIXED_PAGES; i++)
        expect_page(&heap, other + i * PAGE, heap.identity[fixed.first + i], "WRITE_FIXED");
    fixed.writes++;
}

/* A slot of the file and a page of the heap take part in one transfer at a time. */
static void transfer_async(void)
{
    uint32_t page[DEPTH];
    bool reading[DEPTH];
    for (uint32_t slot = 0; slot < DEPTH; slot++) {
        uint32_t stripe = async.npages / DEPTH;
        page[slot] = async.first + slot * stripe + (uint32_t)rng_below(&async.rng, stripe);
        reading[slot] = async.in_file[slot].generation && rng_below(&async.rng, 3);
        if (!reading[slot] && rng_below(&async.rng, 2))
            renew(page[slot]);
        ring_prepare(&ring, reading[slot] ? IORING_OP_READ : IORING_OP_WRITE, file_fd, page_at(page[slot]), PAGE,
                     (uint64_t)file_at(async.file_first + slot), slot);
    }
    ring_enter(&ring, 0);
    heap_verify_page(&heap, random_page(&fixed), "transfers in flight");
    for (uint32_t done = 0; done < DEPTH; done++) {
        struct completion completion = ring_take(&ring);
        uint32_t slot = (uint32_t)completion.user_data;
        expect_length(reading[slot] ? "IORING_OP_READ" : "IORING_OP_WRITE", completion.result, PAGE);
        if (reading[slot]) {
            heap.identity[page[slot]] = async.in_file[slot];
            async.reads++;
        } else {
            async.in_file[slot] = heap.identity[page[slot]];
            async.writes++;
        }
        heap_verify_page(&heap, page[slot], reading[slot] ? "IORING_OP_READ" : "IORING_OP_WRITE");
    }
}

/* Plain preads and pwrites: the thread waits in the kernel while the device works on its pages. */
static void *transfer_in_thread(void *argument)
{
    struct part *part = argument;
    while (!atomic_load(&stop)) {
        uint32_t npages = 1 + (uint32_t)rng_below(&part->rng, THREAD_PAGES);
        uint32_t page = part->first + (uint32_t)rng_below(&part->rng, part->npages - npages + 1);
        uint32_t slot = (uint32_t)rng_below(&part->rng, THREAD_PAGES - npages + 1);
        bool known = true;
        for (uint32_t i = 0; i < npages; i++)
            known = known && part->in_file[slot + i].generation;
        if (known && rng_below(&part->rng, 4)) {
            expect_length("pread", pread(file_fd, page_at(page), npages * PAGE, file_at(part->file_first + slot)),
                          npages * PAGE);
            memcpy(&heap.identity[page], &part->in_file[slot], npages * sizeof(struct identity));
            part->reads++;
        } else {
            renew(page);
            expect_length("pwrite", pwrite(file_fd, page_at(page), npages * PAGE, file_at(part->file_first + slot)),
                          npages * PAGE);
            memcpy(&part->in_file[slot], &heap.identity[page], npages * sizeof(struct identity));
            part->writes++;
        }
        for (uint32_t i = 0; i < npages; i++)
            heap_verify_page(&heap, page + i, "O_DIRECT transfer");
        pace();
    }
    return NULL;
}

static void open_file(const char *directory)
{
    file_fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC | O_DIRECT, 0600);
    if (file_fd == -1 && errno == EINVAL) {
        direct = false;
        file_fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    }
    if (file_fd == -1)
        fail_errno(directory);
    uint32_t npages = FIXED_PAGES + DEPTH + MAX_THREADS * THREAD_PAGES;
    if (ftruncate(file_fd, file_at(npages)) == -1)
        fail_errno("ftruncate");
}

/* The registered pages stand between the two halves of the heap; the ring has the upper half, the threads the lower. */
static void share_out(unsigned nthreads, uint64_t seed)
{
    uint32_t half = (uint32_t)heap.npages / 2, each = half / (nthreads ? nthreads : 1);
    fixed = (struct part){.first = half, .npages = FIXED_PAGES, .rng = {seed}};
    async = (struct part){.first = half + FIXED_PAGES,
                          .npages = (uint32_t)heap.npages - half - FIXED_PAGES,
                          .file_first = FIXED_PAGES,
                          .rng = {seed + 1}};
    for (unsigned i = 0; i < nthreads; i++)
        threads[i] = (struct part){.first = i * each,
                                   .npages = each,
                                   .file_first = FIXED_PAGES + DEPTH + i * THREAD_PAGES,
                                   .rng = {seed + 2 + i}};
}

static void *transfer_by_ring(void *argument)
{
    char *other = heap_alloc(FIXED_PAGES * PAGE);
    while (!atomic_load(&stop)) {
        if (rng_below(&fixed.rng, 2))
            read_fixed(other);
        else
            write_fixed(other);
        transfer_async();
        pace();
    }
    return argument;
}

static void start_thread(pthread_t *ret, void *(*run)(void *), void *argument)
{
    if (pthread_create(ret, NULL, run, argument) != 0)
        fail("FAILED pthread_create");
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"seconds", 1, NULL, 's'}, {"mib", 1, NULL, 'm'},     {"dir", 1, NULL, 'd'},
                                          {"pace", 1, NULL, 'p'},    {"threads", 1, NULL, 't'}, {"seed", 1, NULL, 'e'},
                                          {0}};
    uint64_t seconds = 10, mib = 64, nthreads = 1, seed = 1;
    const char *directory = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': seconds = parse_number("--seconds", optarg); break;
        case 'm': mib = parse_number("--mib", optarg); break;
        case 'd': directory = optarg; break;
        case 'p': pace_us = (unsigned)parse_number("--pace", optarg); break;
        case 't': nthreads = parse_number("--threads", optarg); break;
        case 'e': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib < 4 || nthreads > MAX_THREADS)
        fail("--mib must be at least 4 and --threads at most %d", MAX_THREADS);
    if (!ring_init(&ring, 2 * DEPTH)) {
        printf("{\"target\":\"pins\",\"skipped\":\"io_uring_setup: %s\"}\n", strerror(errno));
        return SKIPPED;
    }
    heap_init(&heap, mib * MIB, seed, false);
    open_file(directory);
    share_out((unsigned)nthreads, mix64(seed));
    ring_register_buffer(&ring, page_at(fixed.first), FIXED_PAGES * PAGE);

    sigset_t end_signals = block_end_signals();
    start_thread(&fixed.thread, transfer_by_ring, NULL);
    for (unsigned i = 0; i < nthreads; i++)
        start_thread(&threads[i].thread, transfer_in_thread, &threads[i]);
    reply("\"ready\":true,\"pid\":%d,\"fixed_address\":%lu", (int)getpid(), (unsigned long)page_at(fixed.first));
    uint64_t start_ns = now_ns();
    wait_for_end(&end_signals, start_ns + seconds * NS_PER_S);
    atomic_store(&stop, true);
    pthread_join(fixed.thread, NULL);
    uint64_t thread_reads = 0, thread_writes = 0;
    for (unsigned i = 0; i < nthreads; i++) {
        pthread_join(threads[i].thread, NULL);
        thread_reads += threads[i].reads;
        thread_writes += threads[i].writes;
    }
    heap_sum(&heap);
    printf("{\"target\":\"pins\",\"fixed_reads\":%lu,\"fixed_writes\":%lu,\"async_reads\":%lu,\"async_writes\":%lu,"
           "\"thread_reads\":%lu,\"thread_writes\":%lu,\"interrupted\":%lu,\"direct\":%s,\"seconds\":%.3f,"
           "\"errors\":0}\n",
           fixed.reads, fixed.writes, async.reads, async.writes, thread_reads, thread_writes, ring.interrupted,
           direct ? "true" : "false", (double)(now_ns() - start_ns) / 1e9);
    return 0;
}
