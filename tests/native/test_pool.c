/* pool.c against a plain queue of clusters. */
#include <assert.h>
#include <stdlib.h>

#include "internal.h"

enum { SHIFT = 16, ROOM = 1 << 16 };

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (seed >> 11) % below;
}

static struct cluster { uint64_t host; uint32_t file; bool reused; } queue[ROOM];
static uint64_t first, last;

static void add(struct pool *pool)
{
    // Often what follows the last run, so that runs grow.
    bool follows = last && rnd(2);
    struct cluster next = {rnd(1 << 20) << SHIFT, rnd(3), rnd(4) == 0};
    if (follows) {
        next = queue[last - 1];
        next.host += 1 << SHIFT;
        next.file ^= rnd(4) == 0;
        next.reused ^= rnd(4) == 0;
    }
    uint64_t count = rnd(5);
    assert(pool_add(pool, SHIFT, next.file, next.host, count, next.reused) == 0);
    for (uint64_t i = 0; i < count; i++)
        queue[last++] = (struct cluster){next.host + (i << SHIFT), next.file, next.reused};
}

static void take(struct pool *pool)
{
    struct pool_run run;
    if (first == last) {
        assert(!pool_take(pool, SHIFT, &run));
        return;
    }
    struct cluster *next = &queue[first++];
    assert(pool_take(pool, SHIFT, &run));
    assert(run.host == next->host && run.file == next->file && run.reused == next->reused);
    assert(run.count == 1);
}

/* All of it, in bites; afterwards it goes on. */
static void empty(struct pool *pool)
{
    struct vm_range ranges[3];
    uint32_t files[3], count;
    while ((count = pool_take_runs(pool, SHIFT, ranges, files, 3)))
        for (uint32_t i = 0; i < count; i++)
            for (uint64_t at = 0; at < ranges[i].length; at += 1 << SHIFT, first++)
                assert(queue[first].host == ranges[i].offset + at && queue[first].file == files[i]);
    assert(first == last && pool->clusters == 0);
}

int main(void)
{
    struct pool pool = {0};
    uint64_t most = 0;
    for (int round = 0; round < 60000; round++) {
        if (last > ROOM - 8) {
            empty(&pool);
            first = last = 0;
        }
        if (rnd(round / 1000 % 2 ? 2 : 5) == 0)  // grows and shrinks in turn
            add(&pool);
        else
            take(&pool);
        if (most < last - first)
            most = last - first;
        assert(pool.clusters == last - first && pool.high == most);
        if (rnd(5000) == 0)
            empty(&pool);
    }
    free(pool.runs);
    return 0;
}
