/* Pages that look like a program's heap (about 3x under zstd, 4 KiB at a time), made anew from an identity at any
 * moment. So a target keeps 8 bytes a page to know every byte that its heap must hold. Knows nothing of snapd. */
#ifndef BENCH_CONTENT_H
#define BENCH_CONTENT_H

#include "common.h"

#define PAGE_WORDS (PAGE / sizeof(uint64_t))

/* Generation 0 is a page of zeros, whatever its index. A copied page keeps the identity of its source. */
struct identity {
    uint32_t index;
    uint32_t generation;
};

static inline void fill_objects(uint64_t *words, struct rng *rng)
{
    uint64_t arena = 0x00007f3a40000000ull + (rng_next(rng) & 0x3ff00000);
    for (size_t i = 0; i < PAGE_WORDS; i += 8) {
        uint64_t r = rng_next(rng);
        words[i] = 1 + (r & 3);
        words[i + 1] = 0x00005581c0a3e4c0ull;
        words[i + 2] = arena + ((r >> 8) & 0xffff0);
        words[i + 3] = arena + i * 8;
        words[i + 4] = (r >> 32) & 0x3f;
        words[i + 5] = r & 0x40 ? 0 : rng_next(rng) >> 12;
        words[i + 6] = (uint64_t)-1;
        words[i + 7] = 0;
    }
}

static inline void fill_text(char *text, struct rng *rng)
{
    static const char words[64][12] = {
        "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they",
        "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "word", "but", "what", "some", "we", "can",
        "out", "other", "were", "all", "there", "when", "up", "use", "your", "how", "said", "an", "each", "she",
        "which", "their", "time", "if", "will", "way", "about", "many", "then", "them", "write", "would", "like", "so",
        "these", "long", "make", "thing",
    };
    for (size_t at = 0; at < PAGE;) {
        uint64_t r = rng_next(rng);
        for (int i = 0; i < 8 && at < PAGE; i++, r >>= 8) {
            const char *word = words[r & 63];
            for (; *word && at < PAGE; word++)
                text[at++] = *word;
            if (at < PAGE)
                text[at++] = (r & 0xc0) ? ' ' : '\n';
        }
    }
}

static inline void fill_page(void *page, uint64_t seed, struct identity identity)
{
    uint64_t *words = page;
    if (identity.generation == 0) {
        memset(page, 0, PAGE);
        return;
    }
    struct rng rng = {mix64(seed ^ mix64(((uint64_t)identity.generation << 32) | identity.index))};
    unsigned kind = (unsigned)rng_below(&rng, 100);
    if (kind < 40) {
        fill_objects(words, &rng);
    } else if (kind < 65) {
        fill_text(page, &rng);
    } else if (kind < 91) {
        for (size_t i = 0; i < PAGE_WORDS; i += 4) {
            uint64_t r = rng_next(&rng);
            for (size_t j = 0; j < 4; j++)
                words[i + j] = (r >> (16 * j)) & 0x3ff;
        }
    } else {
        for (size_t i = 0; i < PAGE_WORDS; i++)
            words[i] = rng_next(&rng);
    }
    /* Two pages must never be equal, or one in the place of the other would go unseen. */
    words[0] = ((uint64_t)identity.generation << 32) | identity.index;
}

struct heap {
    char *at;
    size_t npages;
    uint64_t seed;
    uint32_t serial; /* the newest generation given out; none is used twice: old bytes never pass for new ones */
    struct identity *identity; /* shared memory: who loses heap bytes must not lose what they should be as well */
};

static inline void heap_init(struct heap *heap, size_t bytes, uint64_t seed, bool huge)
{
    heap->npages = bytes / PAGE;
    heap->seed = seed;
    heap->serial = 1;
    heap->identity = shared_alloc(heap->npages * sizeof(struct identity));
    heap->at = heap_alloc(heap->npages * PAGE);
    if (huge && madvise(heap->at, heap->npages * PAGE, MADV_HUGEPAGE) == -1)
        fail_errno("MADV_HUGEPAGE");
    for (size_t i = 0; i < heap->npages; i++) {
        heap->identity[i] = (struct identity){.index = (uint32_t)i, .generation = 1};
        fill_page(heap->at + i * PAGE, seed, heap->identity[i]);
    }
}

static inline void heap_renew_page(struct heap *heap, size_t page)
{
    heap->identity[page] = (struct identity){.index = (uint32_t)page, .generation = ++heap->serial};
    fill_page(heap->at + page * PAGE, heap->seed, heap->identity[page]);
}

/* Compares bytes that should be one page of the heap; a mismatch ends the program. */
static inline void expect_page(const struct heap *heap, const void *bytes, struct identity identity, const char *after)
{
    uint64_t expected[PAGE_WORDS];
    fill_page(expected, heap->seed, identity);
    if (memcmp(bytes, expected, PAGE) == 0)
        return;
    const uint64_t *found = bytes;
    size_t word = 0;
    while (word < PAGE_WORDS - 1 && found[word] == expected[word])
        word++;
    fail("MISMATCH after %s address %p page %u generation %u word %zu: expected %016lx found %016lx", after,
         (const void *)(found + word), identity.index, identity.generation, word, expected[word], found[word]);
}

static inline void heap_verify_page(const struct heap *heap, size_t page, const char *after)
{
    expect_page(heap, heap->at + page * PAGE, heap->identity[page], after);
}

/* Verifies every page and returns a checksum of all bytes. */
static inline uint64_t heap_sum(const struct heap *heap)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < heap->npages; i++) {
        const uint64_t *words = (const uint64_t *)(heap->at + i * PAGE);
        heap_verify_page(heap, i, "sum");
        for (size_t w = 0; w < PAGE_WORDS; w++)
            sum = (sum ^ words[w]) * 0x9e3779b97f4a7c15ull + 1;
    }
    return sum;
}

#endif
