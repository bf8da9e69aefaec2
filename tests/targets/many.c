/* A heap in thousands of mappings: large ones that are worth moving, small ones in between, every other page of which
 * has another protection, and all of it verified on command.
 *
 *   many [--large 500] [--small 10000] [--seed 1]
 *
 *   maps            how many mappings the process has
 *   sum             verifies every page; write N SEED gives N random pages new content;
 *                   quit as does the end of input */
#include "content.h"
#include <getopt.h>

#define LARGE_PAGES 16
#define STEP_PAGES (LARGE_PAGES + 1)

/* Page i of the heap; large mappings of 16 pages come first, then small ones of a page, each before a page without
 * access, so that no two are one mapping. */
static char *room;
static size_t large, small;
static struct heap heap; /* without memory of its own */

static char *address_of(size_t page)
{
    size_t in_large = large * LARGE_PAGES;
    if (page < in_large)
        return room + (page / LARGE_PAGES * STEP_PAGES + page % LARGE_PAGES) * PAGE;
    return room + (large * STEP_PAGES + 2 * (page - in_large)) * PAGE;
}

static size_t count_maps(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    size_t lines = 0;
    if (!maps)
        fail_errno("/proc/self/maps");
    for (int c; (c = getc(maps)) != EOF;)
        lines += c == '\n';
    fclose(maps);
    return lines;
}

static void make_mappings(void)
{
    size_t npages = large * STEP_PAGES + 2 * small;
    room = mmap(NULL, npages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        fail_errno("mmap of a reservation");
    for (size_t i = 0; i < large; i++)
        if (mprotect(room + i * STEP_PAGES * PAGE, LARGE_PAGES * PAGE, PROT_READ | PROT_WRITE) == -1)
            fail_errno("mprotect");
    for (size_t i = 0; i < small; i++)
        if (mprotect(room + (large * STEP_PAGES + 2 * i) * PAGE, PAGE, PROT_READ | PROT_WRITE) == -1)
            fail_errno("mprotect");
}

static void renew(size_t page)
{
    heap.identity[page] = (struct identity){.index = (uint32_t)page, .generation = ++heap.serial};
    fill_page(address_of(page), heap.seed, heap.identity[page]);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"large", 1, NULL, 'l'}, {"small", 1, NULL, 's'}, {"seed", 1, NULL, 'e'}, {0}};
    large = 500, small = 10000, heap.seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'l': large = parse_number("--large", optarg); break;
        case 's': small = parse_number("--small", optarg); break;
        case 'e': heap.seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    heap.npages = large * LARGE_PAGES + small;
    if (heap.npages == 0)
        fail("--large or --small must be positive");
    heap.identity = shared_alloc(heap.npages * sizeof heap.identity[0]);
    make_mappings();
    for (size_t page = 0; page < heap.npages; page++)
        renew(page);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        struct rng rng = {mix64(command.argument[1])};
        if (strcmp(command.name, "maps") == 0) {
            reply("\"maps\":%zu", count_maps());
        } else if (strcmp(command.name, "sum") == 0) {
            for (size_t page = 0; page < heap.npages; page++)
                expect_page(&heap, address_of(page), heap.identity[page], "sum");
            reply("\"pages\":%zu", heap.npages);
        } else if (strcmp(command.name, "write") == 0) {
            for (uint64_t n = command.argument[0]; n; n--)
                renew(rng_below(&rng, heap.npages));
            reply("\"pages\":%lu", command.argument[0]);
        } else {
            reply_error("unknown command");
        }
    }
    reply("\"quit\":true");
    return 0;
}
