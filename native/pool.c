/* Reserved host clusters that read as zeros, first in, first out, so that sequential writes stay
 * sequential on the host. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

uint32_t pool_at(const struct vm_engine *engine, uint64_t offset)
{
    uint32_t low = 0;
    uint32_t high = engine->pool_count - 1;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (offset < engine->pools[middle].end)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

struct pool *pool_of(struct vm_engine *engine, uint32_t file)
{
    uint32_t i = engine->pool_count - 1;
    while (i && engine->pools[i].file != file)
        i--;
    return &engine->pools[i];
}

bool pool_take(struct pool *pool, uint32_t cluster_shift, struct pool_run *ret)
{
    if (!pool->clusters)
        return false;
    struct pool_run *run = &pool->runs[pool->first];
    *ret = *run;
    ret->count = 1;
    run->host += 1ULL << cluster_shift;
    pool->clusters--;
    if (!--run->count) {
        pool->first++;
        if (!--pool->count)
            pool->first = 0;
    }
    return true;
}

int pool_add(struct pool *pool, uint32_t cluster_shift, uint32_t file, uint64_t host, uint64_t count,
             bool reused)
{
    if (!count)
        return 0;
    struct pool_run *last = pool->count ? &pool->runs[pool->first + pool->count - 1] : NULL;
    if (last && last->file == file && last->reused == reused
        && last->host + (last->count << cluster_shift) == host) {
        last->count += count;
    } else {
        if (pool->first + pool->count == pool->room) {
            if (pool->first) {
                memmove(pool->runs, pool->runs + pool->first, pool->count * sizeof *pool->runs);
                pool->first = 0;
            } else {
                uint32_t room = pool->room ? pool->room * 2 : 16;
                struct pool_run *runs = realloc(pool->runs, room * sizeof *runs);
                if (!runs)
                    return -ENOMEM;
                pool->runs = runs;
                pool->room = room;
            }
        }
        pool->runs[pool->first + pool->count++] = (struct pool_run){host, count, file, reused};
    }
    pool->clusters += count;
    if (pool->high < pool->clusters)
        pool->high = pool->clusters;
    return 0;
}

uint32_t pool_take_runs(struct pool *pool, uint32_t cluster_shift, struct vm_range *ret,
                        uint32_t *ret_files, uint32_t max)
{
    uint32_t taken = 0;
    for (; taken < max && pool->count; taken++) {
        struct pool_run *run = &pool->runs[pool->first++];
        ret[taken] = (struct vm_range){run->host, run->count << cluster_shift};
        ret_files[taken] = run->file;
        pool->clusters -= run->count;
        if (!--pool->count)
            pool->first = 0;
    }
    return taken;
}
