/* Requests: from their start through the walk over the map to their end.
 *
 * A walk goes from cursor to end, submitting pieces for what the map knows.  Where it cannot go on
 * it parks, keeps what was submitted, and goes on from the cursor when woken.  All writes of one
 * request walk upwards and a cluster stops being busy when its own data is written, whatever
 * happens to the rest of its request, so parked requests never wait for each other in a circle. */
#include <errno.h>
#include <string.h>

#include "internal.h"

#define MAX_PIECES 64  // of one request in flight

enum step {
    STEP_WALK,     // data
    STEP_DURABLE,  // a write is followed by a flush
    STEP_HEAD,     // of a range of zeros: up to the first whole cluster
    STEP_TAIL,     // ... from the last whole cluster on
    STEP_WHOLE,    // ... the clusters between them, by a fault
    STEP_WRITTEN   // ... or, where the image cannot, by writing
};

static void finish(struct vm_engine *engine, struct request *request);

void list_push(struct request_list *list, struct request *request)
{
    request->next = NULL;
    *(list->first ? &list->last->next : &list->first) = request;
    list->last = request;
}

struct request *list_pop(struct request_list *list)
{
    struct request *request = list->first;
    if (request)
        list->first = request->next;
    return request;
}

void request_park(struct vm_engine *engine, struct request *request, enum wait wait, uint64_t wait_for)
{
    request->wait = wait;
    request->wait_for = wait_for;
    list_push(&engine->parked, request);
}

void request_fail(struct vm_engine *engine, struct request *request, int error)
{
    if (!request->error)
        request->error = error;
    request->walked = true;
    if (!request->pieces)
        finish(engine, request);
}

static struct request_list unpark(struct vm_engine *engine, enum wait wait, uint64_t wait_for,
                                  bool all)
{
    struct request_list parked = engine->parked, taken = {0};
    struct request *request;
    engine->parked = (struct request_list){0};
    while ((request = list_pop(&parked))) {
        bool match = all || (request->wait == wait && request->wait_for == wait_for);
        if (match)
            request->wait = NOT_PARKED;
        list_push(match ? &taken : &engine->parked, request);
    }
    return taken;
}

struct request_list requests_take(struct vm_engine *engine, enum wait wait, uint64_t wait_for)
{
    return unpark(engine, wait, wait_for, false);
}

void requests_wake(struct vm_engine *engine, enum wait wait, uint64_t wait_for, int error)
{
    // Taken out first: running one may park others.
    struct request_list taken = requests_take(engine, wait, wait_for);
    struct request *request;
    while ((request = list_pop(&taken))) {
        if (error)
            request_fail(engine, request, error);
        else
            list_push(&engine->ready, request);
    }
}

void requests_fail_parked(struct vm_engine *engine, int error)
{
    struct request_list taken = unpark(engine, NOT_PARKED, 0, true);
    struct request *request;
    for (struct fault *fault = engine->asked; fault; fault = fault->next)
        fault->request = NULL;
    engine->exclusive = NULL;
    while ((request = list_pop(&taken)))
        request_fail(engine, request, error);
}

static void leave_exclusive(struct vm_engine *engine, struct request *request)
{
    struct request **at = &engine->exclusive;
    if (!request->exclusive)
        return;
    while (*at && *at != request)
        at = &(*at)->next_exclusive;
    if (*at)
        *at = request->next_exclusive;
    request->exclusive = false;
    requests_wake(engine, WAIT_RANGE, 0, 0);
}

static bool overlaps_exclusive(struct vm_engine *engine, uint64_t offset, uint64_t end)
{
    for (struct request *other = engine->exclusive; other; other = other->next_exclusive)
        if (offset < other->end && other->cursor < end)
            return true;
    return false;
}

static bool ask_begin(struct vm_engine *engine, struct request *request)
{
    if (engine->begun)
        return true;
    if (!engine->begin_asked) {
        engine->begin_asked = true;
        fault_ask(engine, VM_FAULT_BEGIN, 0, 0, 0, NULL);
    }
    request_park(engine, request, WAIT_BEGIN, 0);
    return false;
}

void walk_submit(struct vm_engine *engine, struct piece **open)
{
    if (*open)
        piece_submit(engine, *open);
    *open = NULL;
}

struct piece *walk_piece(struct vm_engine *engine, struct request *request, struct piece **open,
                         uint8_t op, uint32_t file, uint64_t host, uint64_t length)
{
    struct piece *last = *open;
    uint64_t at = request->cursor - request->offset;
    bool kernel = request->mover == IN_KERNEL && !request->zeroes;
    uint8_t *buf = request->zeroes ? engine->zeros : kernel ? (uint8_t *)at : request->buf + at;
    if (length > MAX_IO)
        length = MAX_IO;
    request->cursor += length;
    // Adjacent on the host is not enough: a hole in between was passed over without a piece.
    if (last && last->op == op && !last->alloc && last->length + length <= MAX_IO
        && last->guest + last->length == request->offset + at
        && (op == PIECE_ZERO || (last->file == file && last->host + last->length == host))) {
        last->length += length;
        return last;
    }
    walk_submit(engine, open);
    struct piece *piece = piece_new(engine, op);
    piece->request = request;
    piece->file = file;
    piece->host = host;
    piece->guest = request->offset + at;
    piece->length = length;
    piece->mover = kernel ? IN_KERNEL : IN_MEMORY;
    piece->tag = request->tag;
    piece->buf = buf;
    request->pieces++;
    *open = piece;
    return piece;
}

static bool ask_leaf(struct vm_engine *engine, struct request *request)
{
    uint64_t index = request->cursor >> engine->map.leaf_shift;
    if (!fault_find(engine, VM_FAULT_FILL, index << engine->map.leaf_shift))
        fault_ask(engine, VM_FAULT_FILL, index << engine->map.leaf_shift, 0, 0, NULL);
    request_park(engine, request, WAIT_LEAF, index);
    return false;
}

// Inflated bytes, at most length of them, or park.
static bool read_inflated(struct vm_engine *engine, struct request *request, uint32_t layer,
                          uint64_t length)
{
    uint64_t at = request->cursor, from = at - request->offset;
    const struct inflated *slot = inflated_find(engine, layer, at);
    if (!slot) {
        uint64_t unit = at >> engine->map.unit_shift << engine->map.unit_shift;
        if (request->inflate_error && request->inflate_unit == unit) {
            request->error = request->inflate_error;
            return true;
        }
        struct fault *fault = fault_find(engine, VM_FAULT_INFLATE, unit);
        uint64_t id = fault ? fault->ask.id
                            : fault_ask(engine, VM_FAULT_INFLATE, unit, 0, layer, NULL);
        request_park(engine, request, WAIT_INFLATE, id);
        return false;
    }
    if (length > slot->offset + slot->length - at)
        length = slot->offset + slot->length - at;
    const uint8_t *data = slot->data + (at - slot->offset);
    if (request->mover == IN_MEMORY)
        memcpy(request->buf + from, data, length);
    else
        request->error = ublk_put(engine, request, from, data, length);
    request->cursor += length;
    return true;
}

// One unit or less of a read at the cursor.  false: parked.
static bool read_unit(struct vm_engine *engine, struct request *request, struct leaf *leaf,
                      struct piece **open, uint64_t length)
{
    uint64_t at = request->cursor;
    uint64_t entry = *map_entry(&engine->map, leaf, at);
    uint64_t within = at & ((1ULL << engine->map.unit_shift) - 1);
    switch (entry_kind(entry)) {
    case VM_DATA:
    case VM_SHARED:
        walk_piece(engine, request, open, PIECE_READ, entry_source(entry),
                   entry_host(entry) + within, length);
        return true;
    case VM_ABSENT:
    case VM_ZERO:
        if (request->mover == IN_MEMORY) {
            memset(request->buf + (at - request->offset), 0, length);
            request->cursor += length;
        } else {
            walk_piece(engine, request, open, PIECE_ZERO, 0, 0, length);
        }
        return true;
    case VM_COMPRESSED:
        return read_inflated(engine, request, entry_source(entry), length);
    default:
        request->error = -EIO;
        return true;
    }
}

// One unit or less, or a whole new cluster, of a write at the cursor.  false: parked.
static bool write_unit(struct vm_engine *engine, struct request *request, struct leaf *leaf,
                       struct piece **open, uint64_t length)
{
    struct map *map = &engine->map;
    uint64_t at = request->cursor;
    uint64_t entry = *map_entry(map, leaf, at);
    uint64_t cluster = 1ULL << map->cluster_shift;
    if (*map_entry(map, leaf, at & ~(cluster - 1)) & ENTRY_BUSY) {
        walk_submit(engine, open);
        request_park(engine, request, WAIT_BUSY, 0);
        return false;
    }
    if (request->zeroes && entry_reads_zero(entry)) {
        request->cursor += length;
        return true;
    }
    if (entry_in_place(engine, entry)) {
        uint64_t within = at & ((1ULL << map->unit_shift) - 1);
        walk_piece(engine, request, open, PIECE_WRITE, entry_source(entry),
                   entry_host(entry) + within, length);
        return true;
    }
    if (entry_kind(entry) == VM_INVALID) {
        request->error = -EIO;
        return true;
    }
    uint64_t end = (at | (cluster - 1)) + 1;
    return alloc_cluster(engine, request, leaf, open, end < request->end ? end : request->end);
}

// Walk as far as possible.  false: parked.
static bool walk(struct vm_engine *engine, struct request *request)
{
    struct map *map = &engine->map;
    bool write = request->op != VM_OP_READ;
    struct piece *open = NULL;
    if (request->cursor < request->end && request->origin != FROM_COPY
        && overlaps_exclusive(engine, request->cursor, request->end)) {
        request_park(engine, request, WAIT_RANGE, 0);
        return false;
    }
    if (write && request->cursor < request->end && !ask_begin(engine, request))
        return false;
    while (request->cursor < request->end && !request->error) {
        uint64_t at = request->cursor, left = request->end - at;
        if (request->pieces >= MAX_PIECES) {
            walk_submit(engine, &open);
            request_park(engine, request, WAIT_PACE, (uintptr_t)request);
            return false;
        }
        if (engine->config.flags & VM_FLAT) {
            walk_piece(engine, request, &open, write ? PIECE_WRITE : PIECE_READ,
                       engine->config.flat_file,
                       engine->config.flat_offset + at, left);
            continue;
        }
        struct leaf *leaf = map_leaf(map, at);
        if (!leaf) {
            walk_submit(engine, &open);
            return ask_leaf(engine, request);
        }
        uint64_t unit_left = (1ULL << map->unit_shift) - (at & ((1ULL << map->unit_shift) - 1));
        uint64_t length = left < unit_left ? left : unit_left;
        bool on = write ? write_unit(engine, request, leaf, &open, length)
                        : read_unit(engine, request, leaf, &open, length);
        if (!on) {
            walk_submit(engine, &open);
            return false;
        }
    }
    walk_submit(engine, &open);
    return true;
}

static void run_walk(struct vm_engine *engine, struct request *request)
{
    if (!walk(engine, request))
        return;
    request->walked = true;
    if (!request->pieces)
        finish(engine, request);
}

static void start_walk(struct vm_engine *engine, struct request *request, uint64_t offset,
                       uint64_t end)
{
    request->cursor = offset;
    request->end = end;
    request->walked = false;
    run_walk(engine, request);
}

static void flush(struct vm_engine *engine, struct request *request)
{
    if (engine->failed) {
        request_fail(engine, request, engine->failed);
        return;
    }
    if (engine->dirty_count || engine->committing_count) {
        uint64_t id = fault_ask(engine, VM_FAULT_FLUSH, 0, 0, 0, request);
        request_park(engine, request, WAIT_ANSWER, id);
        return;
    }
    if (engine->begun) {
        sync_ask(engine, request);
        return;
    }
    request->walked = true;
    finish(engine, request);
}

// The whole clusters inside a range; the last one of the disk may be short.
static void whole_clusters(const struct vm_engine *engine, const struct request *request,
                           uint64_t *start, uint64_t *end)
{
    uint64_t mask = (1ULL << engine->config.cluster_shift) - 1;
    *start = (request->offset + mask) & ~mask;
    *end = request->offset + request->length;
    if (*end != engine->config.size)
        *end &= ~mask;
    if (*start >= *end)
        *start = *end = request->offset + request->length;
}

// true: the range is this request's alone.  Taken at once, so that it has its turn however many
// others use it; false: parked or over.
static bool take_range(struct vm_engine *engine, struct request *request)
{
    bool flat = engine->config.flags & VM_FLAT;
    if (request->exclusive)
        return true;
    whole_clusters(engine, request, &request->cursor, &request->end);
    if (request->cursor == request->end
        || (!flat && map_range_reads_zero(&engine->map, request->cursor, request->end))) {
        request->walked = true;
        finish(engine, request);
        return false;
    }
    if (overlaps_exclusive(engine, request->cursor, request->end)) {
        request_park(engine, request, WAIT_RANGE, 0);
        return false;
    }
    if (!ask_begin(engine, request))
        return false;
    request->exclusive = true;
    request->next_exclusive = engine->exclusive;
    engine->exclusive = request;
    return true;
}

static void ask_whole(struct vm_engine *engine, struct request *request)
{
    bool flat = engine->config.flags & VM_FLAT;
    if (!take_range(engine, request))
        return;
    if (!flat && map_range_busy(&engine->map, request->cursor, request->end)) {
        request_park(engine, request, WAIT_BUSY, 0);
    } else if (!request->drained) {
        request->drained = true;
        drain_request(engine, request);
    } else {
        uint32_t type = request->op == VM_OP_DISCARD ? VM_FAULT_DISCARD : VM_FAULT_ZERO;
        uint64_t id = fault_ask(engine, type, request->cursor, request->end - request->cursor, 0,
                                request);
        request_park(engine, request, WAIT_ANSWER, id);
    }
}

// Run the current step of a discard or write-zeroes.
static void zero_step(struct vm_engine *engine, struct request *request)
{
    uint64_t start, end, last = request->offset + request->length;
    whole_clusters(engine, request, &start, &end);
    request->zeroes = true;
    switch (request->step) {
    case STEP_HEAD:
        start_walk(engine, request, request->offset, start);
        break;
    case STEP_TAIL:
        start_walk(engine, request, end, last);
        break;
    case STEP_WHOLE:
        request->walked = false;
        ask_whole(engine, request);
        break;
    default:
        start_walk(engine, request, start, end);
        break;
    }
}

static void start_zeroes(struct vm_engine *engine, struct request *request)
{
    uint64_t start, end;
    bool discard = request->op == VM_OP_DISCARD;
    whole_clusters(engine, request, &start, &end);
    request->step = discard ? STEP_WHOLE : STEP_HEAD;
    if (discard && (start == end || !(engine->config.flags & VM_CAN_DISCARD))) {
        request->walked = true;
        finish(engine, request);
        return;
    }
    zero_step(engine, request);
}

// After a step that went well: true if another one was started.
static bool next_step(struct vm_engine *engine, struct request *request)
{
    bool through = request->fua || engine->config.flags & VM_WRITETHROUGH;
    bool writes = request->op == VM_OP_WRITE || request->op == VM_OP_WRITE_ZEROES;
    if (request->op == VM_OP_WRITE_ZEROES && request->step >= STEP_HEAD
        && request->step < STEP_WHOLE) {
        request->step++;
        if (request->step == STEP_WHOLE
            && (request->nounmap || !(engine->config.flags & VM_CAN_ZERO)))
            request->step = STEP_WRITTEN;
        zero_step(engine, request);
        return true;
    }
    if (writes && through && request->step != STEP_DURABLE) {
        request->step = STEP_DURABLE;
        flush(engine, request);
        return true;
    }
    return false;
}

static void finish(struct vm_engine *engine, struct request *request)
{
    leave_exclusive(engine, request);
    if (!request->error && next_step(engine, request))
        return;
    if (request->origin == FROM_COPY) {
        copy_read_done(engine, request->owner, request->error);
        return;
    }
    engine->requests--;
    if (request->origin == FROM_UBLK)
        ublk_complete(engine, request);
    else
        sem_post(&((struct call *)request->owner)->done);
}

void request_piece_done(struct vm_engine *engine, struct request *request, int error)
{
    request->pieces--;
    if (error && !request->error)
        request->error = error;
    if (request->walked) {
        if (!request->pieces)
            finish(engine, request);
    } else if (request->wait == WAIT_PACE && request->pieces <= MAX_PIECES / 2) {
        requests_wake(engine, WAIT_PACE, (uintptr_t)request, request->error);
    }
}

void request_answered(struct vm_engine *engine, struct request *request, int error)
{
    if (request->exclusive) {
        if (!error && !(engine->config.flags & VM_FLAT))
            map_set_zero(&engine->map, request->cursor, request->end);
        leave_exclusive(engine, request);
        if (error == -EOPNOTSUPP) {
            if (request->op == VM_OP_WRITE_ZEROES) {
                request->step = STEP_WRITTEN;
                zero_step(engine, request);
                return;
            }
            error = 0;  // a discard is a hint
        }
    }
    // What failed meanwhile may be what this was to make durable.
    if (!error && (request->op == VM_OP_FLUSH || request->step == STEP_DURABLE))
        error = engine->failed;
    if (error) {
        request_fail(engine, request, error);
        return;
    }
    request->walked = true;
    finish(engine, request);
}

void request_run(struct vm_engine *engine, struct request *request)
{
    if (engine->stopping) {
        request_fail(engine, request, -ESHUTDOWN);
        return;
    }
    if (request->origin == FROM_UBLK && !request->prepared && !ublk_prepare(engine, request))
        return;
    if (request->op != VM_OP_READ && engine->failed) {
        request_fail(engine, request, engine->failed);
        return;
    }
    if (request->waits_for_pieces && !request->drained) {
        request->drained = true;
        drain_request(engine, request);
        return;
    }
    switch (request->op) {
    case VM_OP_READ:
    case VM_OP_WRITE:
        if (request->step == STEP_DURABLE)
            flush(engine, request);
        else
            run_walk(engine, request);
        break;
    case VM_OP_FLUSH:
        flush(engine, request);
        break;
    default:
        if (request->step == STEP_WALK)
            start_zeroes(engine, request);
        else if (request->step == STEP_WHOLE)
            ask_whole(engine, request);
        else if (request->step == STEP_DURABLE)
            flush(engine, request);
        else
            run_walk(engine, request);
    }
}

void request_start(struct vm_engine *engine, struct request *request)
{
    struct vm_stats *stats = &engine->stats;
    const struct vm_config *config = &engine->config;
    request->cursor = request->offset;
    request->end = request->offset + request->length;
    if (request->origin != FROM_COPY) {
        engine->requests++;
        stats->reads += request->op == VM_OP_READ;
        stats->writes += request->op == VM_OP_WRITE;
        stats->flushes += request->op == VM_OP_FLUSH;
        stats->discards += request->op == VM_OP_DISCARD || request->op == VM_OP_WRITE_ZEROES;
        stats->read_bytes += request->op == VM_OP_READ ? request->length : 0;
        stats->written_bytes += request->op == VM_OP_WRITE ? request->length : 0;
    }
    bool known = request->op <= VM_OP_DISCARD || request->op == VM_OP_WRITE_ZEROES;
    if (request->length > config->size || request->offset > config->size - request->length
        || (request->offset | request->length) % 512)
        request_fail(engine, request, -EINVAL);
    else if (!known)
        request_fail(engine, request, -EOPNOTSUPP);
    else if (config->flags & VM_READ_ONLY && request->op != VM_OP_READ)
        request_fail(engine, request, request->op == VM_OP_FLUSH ? 0 : -EROFS);
    else
        request_run(engine, request);
}
