/* Writes to clusters that the top image does not hold yet: a host cluster from the pool, the rest
 * of the cluster copied where it does not read as zeros, then the mapping published and dirty. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define COPY_BYTES (256u << 10)
#define ALL_COPIES_BYTES (16u << 20)  // a copy lasts as long as the Pager takes to inflate
#define MANY_DIRTY 16384  // ask for a commit: dirty clusters pin their leaves

void engine_fail(struct vm_engine *engine, int error)
{
    if (!engine->failed)
        engine->failed = error;
}

static int dirty_add(struct vm_engine *engine, const struct alloc *alloc)
{
    if (engine->dirty_count + alloc->count > engine->dirty_room) {
        uint32_t room = engine->dirty_room ? engine->dirty_room * 2 : 1024;
        while (room < engine->dirty_count + alloc->count)
            room *= 2;
        struct vm_dirty *dirty = realloc(engine->dirty, room * sizeof *dirty);
        if (!dirty)
            return -ENOMEM;
        engine->dirty = dirty;
        engine->dirty_room = room;
    }
    for (uint64_t i = 0; i < alloc->count; i++)
        engine->dirty[engine->dirty_count++] = (struct vm_dirty){
            alloc->cluster + i, alloc->host + (i << engine->map.cluster_shift), alloc->file,
            alloc->barrier};
    return 0;
}

static struct leaf *leaf_of(struct vm_engine *engine, uint64_t cluster)
{
    return engine->map.leaves[(cluster << engine->map.cluster_shift) >> engine->map.leaf_shift];
}

void alloc_part_done(struct vm_engine *engine, struct alloc *alloc, int error)
{
    struct map *map = &engine->map;
    if (error && !alloc->error)
        alloc->error = error;
    if (--alloc->parts)
        return;
    if (!alloc->error)
        alloc->error = dirty_add(engine, alloc);
    for (uint64_t i = 0; i < alloc->count; i++) {
        uint64_t cluster = alloc->cluster + i;
        struct leaf *leaf = leaf_of(engine, cluster);
        leaf->busy--;
        if (alloc->error) {
            *map_entry(map, leaf, cluster << map->cluster_shift) &= ~ENTRY_BUSY;
        } else {
            leaf->dirty++;
            map_publish(map, cluster, alloc->file, alloc->host + (i << map->cluster_shift));
        }
    }
    if (alloc->error) {
        // What is in the host clusters now is unknown: they must not go back to the pool.
        fault_tell(engine, VM_FAULT_LOST, alloc->host, alloc->count << map->cluster_shift,
                   alloc->file);
    } else {
        engine->stats.allocations += alloc->count;
        if (engine->dirty_count >= MANY_DIRTY && !fault_find(engine, VM_FAULT_FLUSH, UINT64_MAX))
            fault_ask(engine, VM_FAULT_FLUSH, UINT64_MAX, 0, 0, NULL);
    }
    free(alloc);
    requests_wake(engine, WAIT_BUSY, 0, 0);
}

static void copy_end(struct vm_engine *engine, struct copy *copy, int error)
{
    struct request *parent = copy->parent;
    alloc_part_done(engine, copy->alloc, error);
    engine->copy_bytes -= copy->room;
    requests_wake(engine, WAIT_COPY, 0, 0);
    free(copy->buf);
    free(copy);
    request_piece_done(engine, parent, error);
}

// Read the next stretch that does not read as zeros, or end.
static void copy_next(struct vm_engine *engine, struct copy *copy)
{
    struct map *map = &engine->map;
    for (; copy->part < 2; copy->part++) {
        uint64_t unit = 1ULL << map->unit_shift;
        while (copy->at[copy->part] < copy->end[copy->part]) {
            uint64_t at = copy->at[copy->part];
            uint64_t end = copy->end[copy->part];
            uint64_t unit_end = (at | (unit - 1)) + 1;
            if (!engine->encrypts && map_range_reads_zero(map, at, at + 1)) {
                copy->at[copy->part] = unit_end < end ? unit_end : end;
                continue;
            }
            uint64_t length = end - at < copy->room ? end - at : copy->room;
            copy->read = (struct request){.op = VM_OP_READ,
                                          .origin = FROM_COPY,
                                          .mover = IN_MEMORY,
                                          .offset = at,
                                          .length = length,
                                          .buf = copy->buf,
                                          .waits_for_pieces = copy->waits,
                                          .owner = copy};
            copy->waits = false;
            request_start(engine, &copy->read);
            return;
        }
    }
    copy_end(engine, copy, 0);
}

void copy_read_done(struct vm_engine *engine, struct copy *copy, int error)
{
    if (error) {
        copy_end(engine, copy, error);
        return;
    }
    struct piece *piece = piece_new(engine, PIECE_WRITE);
    piece->copy = copy;
    piece->file = copy->alloc->file;
    piece->host = copy->alloc->host + (copy->read.offset - copy->base);
    piece->guest = copy->read.offset;
    piece->length = copy->read.length;
    piece->buf = copy->buf;
    piece_submit(engine, piece);
}

void copy_write_done(struct vm_engine *engine, struct copy *copy, int error)
{
    copy->at[copy->part] += copy->read.length;
    if (error)
        copy_end(engine, copy, error);
    else
        copy_next(engine, copy);
}

// Whether a part of the cluster is written in place: what is in flight there belongs into a copy.
static bool written_in_place(struct vm_engine *engine, struct leaf *leaf, uint64_t start,
                             uint64_t end)
{
    for (uint64_t at = start; at < end; at += 1ULL << engine->map.unit_shift)
        if (entry_in_place(engine, *map_entry(&engine->map, leaf, at)))
            return true;
    return false;
}

static uint32_t copy_room(const struct vm_engine *engine)
{
    uint64_t cluster = 1ULL << engine->map.cluster_shift;
    return cluster < COPY_BYTES ? cluster : COPY_BYTES;
}

static struct copy *copy_new(struct vm_engine *engine, struct request *request, struct alloc *alloc,
                             uint64_t start, uint64_t part, uint64_t part_end, uint64_t end)
{
    struct copy *copy = calloc(1, sizeof *copy);
    uint32_t room = copy_room(engine);
    if (!copy || posix_memalign((void **)&copy->buf, 4096, room < 4096 ? 4096 : room)) {
        free(copy);
        return NULL;
    }
    engine->copy_bytes += room;
    copy->alloc = alloc;
    copy->parent = request;
    copy->base = start;
    copy->room = room;
    copy->at[0] = start;
    copy->end[0] = part;
    copy->at[1] = part_end;
    copy->end[1] = end;
    return copy;
}

// A host cluster for a guest cluster.  false: the request was parked.
static bool take_host(struct vm_engine *engine, struct request *request, struct piece **open,
                      uint64_t start, struct pool_run *ret)
{
    struct map *map = &engine->map;
    uint64_t size = 1ULL << map->cluster_shift;
    if (engine->config.flags & VM_IDENTITY) {
        *ret = (struct pool_run){start, 1, engine->config.identity_file, false};
        return true;
    }
    uint32_t zone = pool_at(engine, start);
    struct pool *pool = &engine->pools[zone];
    // Ask before it is empty, so that the answer comes while the rest is being used.
    if (pool->clusters <= pool->high / 2 && !pool->refill_asked) {
        uint64_t end = request->end < pool->end ? request->end : pool->end;
        pool->refill_asked = true;
        fault_ask(engine, VM_FAULT_REFILL, start, 0, (end - request->cursor + size - 1) / size,
                  NULL);
    }
    if (!pool_take(pool, map->cluster_shift, ret)) {
        walk_submit(engine, open);
        request_park(engine, request, WAIT_POOL, zone);
        return false;
    }
    return true;
}

bool alloc_cluster(struct vm_engine *engine, struct request *request, struct leaf *leaf,
                   struct piece **open, uint64_t part_end)
{
    struct map *map = &engine->map;
    uint64_t size = 1ULL << map->cluster_shift;
    uint64_t part = request->cursor;
    uint64_t cluster = part >> map->cluster_shift;
    uint64_t start = cluster << map->cluster_shift;
    uint64_t end = start + size < engine->config.size ? start + size : engine->config.size;
    struct pool_run run;

    bool hides = !map_range_reads_zero(map, start, end);
    bool copies = hides && ((part > start && !map_range_reads_zero(map, start, part))
                            || (part_end < end && !map_range_reads_zero(map, part_end, end)));
    if (engine->encrypts)
        copies = part > start || part_end < end;  // zeros on the host do not read as zeros
    if (copies && engine->copy_bytes + copy_room(engine) > ALL_COPIES_BYTES) {
        walk_submit(engine, open);
        request_park(engine, request, WAIT_COPY, 0);
        return false;
    }
    if (!take_host(engine, request, open, start, &run))
        return false;
    uint64_t host = run.host + (part - start);
    struct alloc *last = *open ? (*open)->alloc : NULL;
    bool extends = last && !copies && !request->zeroes && last->parts == 1
                   && last->file == run.file && last->cluster + last->count == cluster
                   && last->host + (last->count << map->cluster_shift) == run.host
                   && (*open)->host + (*open)->length == host
                   && (*open)->length + (part_end - part) <= MAX_IO;
    struct alloc *alloc = extends ? last : calloc(1, sizeof *alloc);
    struct copy *copy = NULL;
    if (alloc && copies)
        copy = copy_new(engine, request, alloc, start, part, part_end, end);
    if (!alloc || (copies && !copy)) {
        free(alloc);
        fault_tell(engine, VM_FAULT_LOST, run.host, size, run.file);
        request->error = -ENOMEM;
        return true;
    }
    *map_entry(map, leaf, start) |= ENTRY_BUSY;
    leaf->busy++;
    if (extends) {
        last->count++;
        last->barrier |= hides || run.reused;
        (*open)->length += part_end - part;
        request->cursor = part_end;
        return true;
    }
    *alloc = (struct alloc){.cluster = cluster,
                            .count = 1,
                            .host = run.host,
                            .file = run.file,
                            .barrier = hides || run.reused,
                            .parts = 1 + copies};
    if (copy) {
        // This request may have written in place before this: what nobody submits is not waited for.
        walk_submit(engine, open);
        copy->waits = written_in_place(engine, leaf, start, end);
        request->pieces++;
        engine->stats.copies++;
        copy_next(engine, copy);
    }
    if (request->zeroes && !engine->encrypts) {
        // A pool cluster reads as zeros already.
        request->cursor = part_end;
        alloc_part_done(engine, alloc, 0);
        return true;
    }
    walk_submit(engine, open);
    *open = walk_piece(engine, request, open, PIECE_WRITE, run.file, host, part_end - part);
    (*open)->alloc = alloc;
    return true;
}

static int by_cluster(const void *a, const void *b)
{
    const struct vm_dirty *left = a, *right = b;
    return (left->cluster > right->cluster) - (left->cluster < right->cluster);
}

int dirty_take(struct vm_engine *engine, struct vm_dirty *ret, uint32_t max)
{
    uint32_t count = engine->dirty_count < max ? engine->dirty_count : max;
    if (engine->committing_count)
        return -EBUSY;
    if (!count)
        return 0;
    struct vm_dirty *taken = malloc(count * sizeof *taken);
    if (!taken)
        return -ENOMEM;
    memcpy(taken, engine->dirty, count * sizeof *taken);
    engine->dirty_count -= count;
    memmove(engine->dirty, engine->dirty + count, engine->dirty_count * sizeof *taken);
    qsort(taken, count, sizeof *taken, by_cluster);
    memcpy(ret, taken, count * sizeof *taken);
    free(engine->committing);
    engine->committing = taken;
    engine->committing_count = count;
    return count;
}

void dirty_done(struct vm_engine *engine, int error)
{
    // After an error only the map knows these clusters: their leaves stay.
    for (uint32_t i = 0; !error && i < engine->committing_count; i++)
        leaf_of(engine, engine->committing[i].cluster)->dirty--;
    engine->committing_count = 0;
    if (error)
        engine_fail(engine, error);
}
