/* The loop, and the calls that reach it from other threads. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define RING_ENTRIES 512
#define RING_COMPLETIONS 8192
#define MAX_DISK (1ULL << 62)
#define MAX_LEAF_UNITS (1u << 23)  // 64 MiB of map

/* user_data: a piece's address, or with the low bits 1 a ublk tag, 2 the event descriptor */
#define DATA_TAG 1
#define DATA_EVENT 2

static bool served(const struct vm_config *config)
{
    if (config->size % 512 || config->size > MAX_DISK || config->cluster_shift < 9
        || config->cluster_shift > 40)
        return false;
    if (config->flags & VM_FLAT)
        return config->flat_offset <= INT64_MAX - config->size;
    if (config->unit_shift < 9 || config->unit_shift > config->cluster_shift
        || !config->leaf_units || config->leaf_units > MAX_LEAF_UNITS
        || config->leaf_units & (config->leaf_units - 1))
        return false;
    uint64_t leaf = (uint64_t)config->leaf_units << config->unit_shift;
    return leaf >= 1ULL << config->cluster_shift && leaf >= MAX_IO;
}

int vm_engine_create(const struct vm_config *config, struct vm_engine **ret)
{
    if (!served(config))
        return -EINVAL;
    struct vm_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    engine->config = *config;
    engine->ublk.fd = -1;
    engine->event_fd = eventfd(0, EFD_CLOEXEC);
    engine->zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    int error = engine->event_fd < 0 || engine->zero_fd < 0 ? -errno : map_create(&engine->map, config);
    if (!error && posix_memalign((void **)&engine->zeros, 4096, MAX_IO))
        error = -ENOMEM;
    uint64_t end = UINT64_MAX;
    uint32_t file = 0;
    if (!error)
        error = vm_engine_set_zones(engine, &end, &file, 1);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->faults_ready, &attributes);
    pthread_condattr_destroy(&attributes);
    if (error) {
        vm_engine_destroy(engine);
        return error;
    }
    memset(engine->zeros, 0, MAX_IO);
    *ret = engine;
    return 0;
}

static void command_free(struct command *command)
{
    if (command->op != DO_IO)
        free(command->data);
    free(command);
}

static void free_faults(struct fault *fault)
{
    for (struct fault *next; fault; fault = next) {
        next = fault->next;
        free(fault);
    }
}

void vm_engine_destroy(struct vm_engine *engine)
{
    ublk_close(engine);
    map_destroy(&engine->map);
    inflated_destroy(engine);
    for (uint32_t i = 0; i < engine->pool_count; i++)
        free(engine->pools[i].runs);
    free(engine->pools);
    free(engine->dirty);
    free(engine->committing);
    free(engine->zeros);
    free_faults(engine->asked);
    free_faults(engine->faults);
    for (struct command *command = engine->commands, *next; command; command = next) {
        next = command->next;
        command_free(command);  // of an engine that never ran; nobody can be waiting
    }
    for (struct piece *piece = engine->free_pieces, *next; piece; piece = next) {
        next = piece->next;
        free(piece);
    }
    for (uint32_t i = 0; i < engine->file_count; i++)
        if (engine->files[i].sync_fd >= 0)
            close(engine->files[i].sync_fd);
    for (uint32_t i = 0; i < engine->file_count; i++)
        cipher_destroy(engine->files[i].cipher);
    if (engine->event_fd >= 0)
        close(engine->event_fd);
    if (engine->zero_fd >= 0)
        close(engine->zero_fd);
    pthread_cond_destroy(&engine->faults_ready);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

// The kernel tells a failed write-back once to each open file.  Syncing one of our own, we hear of
// those that the Pager's syncs were told, and it of ours.
static int open_for_sync(int fd)
{
    char path[32];
    struct stat stat;
    if (fstat(fd, &stat) || (!S_ISREG(stat.st_mode) && !S_ISBLK(stat.st_mode)))
        return -1;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, (fcntl(fd, F_GETFL) & O_ACCMODE) | O_CLOEXEC);
}

int vm_engine_add_file(struct vm_engine *engine, int fd, int direct_fd, uint32_t direct_align,
                       int owned)
{
    if (engine->file_count == MAX_FILES)
        return -EMFILE;
    if (direct_fd >= 0 && (direct_align < 512 || direct_align & (direct_align - 1)))
        return -EINVAL;
    engine->files[engine->file_count] = (struct file){
        fd, direct_fd, owned ? open_for_sync(fd) : -1, direct_align, owned, NULL};
    return engine->file_count++;
}

int vm_engine_set_cipher(struct vm_engine *engine, uint32_t file, const struct vm_cipher *cipher)
{
    if (file >= engine->file_count || engine->files[file].cipher)
        return -EINVAL;
    int error = cipher_create(cipher, &engine->files[file].cipher);
    engine->encrypts |= !error && engine->files[file].owned;
    return error;
}

int vm_engine_set_zones(struct vm_engine *engine, const uint64_t *ends, const uint32_t *files,
                        uint32_t count)
{
    uint64_t cluster = 1ULL << engine->config.cluster_shift;
    for (uint32_t i = 0; i < count; i++)
        if (i + 1 < count && (ends[i] % cluster || ends[i] >= ends[i + 1]))
            return -EINVAL;
    struct pool *pools = count ? calloc(count, sizeof *pools) : NULL;
    if (!pools)
        return count ? -ENOMEM : -EINVAL;
    for (uint32_t i = 0; i < count; i++)
        pools[i] = (struct pool){.end = i + 1 < count ? ends[i] : UINT64_MAX, .file = files[i]};
    free(engine->pools);
    engine->pools = pools;
    engine->pool_count = count;
    return 0;
}

/* Commands: what the loop does for other threads. */

static void answer_refill(struct vm_engine *engine, uint64_t offset, int error)
{
    uint32_t zone = pool_at(engine, offset);
    struct pool *pool = &engine->pools[zone];
    pool->refill_asked = false;
    // Empty without an error: all that came was taken meanwhile, so they ask again.
    requests_wake(engine, WAIT_POOL, zone, pool->clusters ? 0 : error);
}

static void answer_begin(struct vm_engine *engine, int error)
{
    engine->begin_asked = false;
    engine->begun = !error;
    requests_wake(engine, WAIT_BEGIN, 0, error);
}

// They run at once: what the next answer brings may push this one out.
static void answer_inflate(struct vm_engine *engine, const struct fault *fault, int error)
{
    struct request_list taken = requests_take(engine, WAIT_INFLATE, fault->ask.id);
    struct request *request;
    while ((request = list_pop(&taken))) {
        request->inflate_unit = fault->ask.offset;
        request->inflate_error = error;
        request_run(engine, request);
    }
}

static int answer(struct vm_engine *engine, struct command *command)
{
    struct fault *fault = fault_take(engine, command->id);
    if (!fault)
        return -ENOENT;
    struct request *request = fault->request;
    int error = command->error;
    switch (fault->ask.type) {
    case VM_FAULT_FILL: {
        uint64_t index = fault->ask.offset >> engine->map.leaf_shift;
        if (!error)
            error = command->count == engine->map.leaf_units
                        ? map_install(&engine->map, index, command->data) : -EINVAL;
        requests_wake(engine, WAIT_LEAF, index, error);
        break;
    }
    case VM_FAULT_INFLATE:
        if (!error)
            error = command->offset <= fault->ask.offset
                            && fault->ask.offset < command->offset + command->length
                        ? inflated_keep(engine, fault->ask.arg, command->offset, command->data,
                                        command->length)
                        : -EIO;
        answer_inflate(engine, fault, error);
        break;
    case VM_FAULT_REFILL:
        answer_refill(engine, fault->ask.offset, error);
        break;
    case VM_FAULT_BEGIN:
        answer_begin(engine, error);
        break;
    default:
        if (request) {
            struct request_list none = engine->parked;
            engine->parked = (struct request_list){0};
            for (struct request *other; (other = list_pop(&none));)
                if (other != request)
                    list_push(&engine->parked, other);
            request->wait = NOT_PARKED;
            request_answered(engine, request, error);
        }
    }
    free(fault);
    return 0;
}

static void fill_stats(struct vm_engine *engine, struct vm_stats *ret)
{
    *ret = engine->stats;
    ret->leaves = engine->map.loaded;
    ret->leaf_bytes = engine->map.bytes;
    ret->dirty = engine->dirty_count + engine->committing_count;
    ret->pool = 0;
    for (uint32_t i = 0; i < engine->pool_count; i++)
        ret->pool += engine->pools[i].clusters;
    ret->in_flight = engine->requests;
    ret->failed = engine->failed;
}

static void stop(struct vm_engine *engine)
{
    engine->stopping = true;
    requests_fail_parked(engine, -ESHUTDOWN);
}

// Returns false if the caller must go on waiting.
static bool execute(struct vm_engine *engine, struct command *command)
{
    switch (command->op) {
    case DO_IO:
        request_start(engine, &((struct call *)command->data)->request);
        break;
    case DO_FILL:
    case DO_INFLATED:
    case DO_ANSWER:
        command->result = answer(engine, command);
        break;
    case DO_POOL_ADD:
        // Out of memory only loses file space, until the end of the session.
        pool_add(pool_of(engine, command->file), engine->config.cluster_shift, command->file,
                 command->offset, command->length, command->flags);
        break;
    case DO_POOL_TAKE:
        command->result = 0;
        for (uint32_t i = 0; i < engine->pool_count && !command->result; i++)
            command->result = pool_take_runs(&engine->pools[i], engine->config.cluster_shift,
                                             command->data, command->data2, command->count);
        break;
    case DO_DIRTY_TAKE:
        command->result = dirty_take(engine, command->data, command->count);
        break;
    case DO_DIRTY_DONE:
        dirty_done(engine, command->error);
        break;
    case DO_DRAIN:
        drain_command(engine, command);
        return false;
    case DO_FAILED:
        engine_fail(engine, command->error);
        break;
    case DO_STATS:
        fill_stats(engine, command->data);
        break;
    case DO_SERVE:
        command->result = ublk_serve(engine, command->id, command->count, command->length,
                                     command->flags);
        break;
    case DO_STOP:
        stop(engine);
        break;
    }
    return true;
}

static void run_commands(struct vm_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    struct command *command = engine->commands;
    engine->commands = NULL;
    pthread_mutex_unlock(&engine->lock);
    while (command) {
        struct command *next = command->next;
        if (!command->waits) {
            execute(engine, command);
            command_free(command);
        } else if (execute(engine, command)) {
            sem_post(&command->done);  // the caller's stack: not to be touched any more
        }
        command = next;
    }
}

// Hand a command to the loop.  false: the loop has ended.
static bool post(struct vm_engine *engine, struct command *command)
{
    uint64_t one = 1;
    pthread_mutex_lock(&engine->lock);
    bool ended = engine->life == ENDED;
    bool first = !engine->commands;
    if (!ended) {
        command->next = NULL;
        *(first ? &engine->commands : &engine->commands_last->next) = command;
        engine->commands_last = command;
    }
    pthread_mutex_unlock(&engine->lock);
    while (!ended && first && write(engine->event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
    return !ended;
}

// The loop has ended: what only it may touch belongs to whoever holds the lock.
static void execute_ended(struct vm_engine *engine, struct command *command)
{
    pthread_mutex_lock(&engine->lock);
    execute(engine, command);
    pthread_mutex_unlock(&engine->lock);
}

// Wait for the loop to have done it; once the loop has ended do it here.
static int post_and_wait(struct vm_engine *engine, struct command *command)
{
    command->waits = true;
    sem_init(&command->done, 0, 0);
    if (post(engine, command)) {
        while (sem_wait(&command->done) && errno == EINTR)
            ;
    } else if (command->op != DO_DRAIN && command->op != DO_SERVE) {
        execute_ended(engine, command);
    } else if (command->op == DO_SERVE) {
        command->result = -ESHUTDOWN;
    }
    sem_destroy(&command->done);
    return command->result;
}

// Give the loop a copy of command, and of length bytes of data.
static int post_copy(struct vm_engine *engine, const struct command *command, const void *data,
                     size_t length)
{
    struct command *copy = malloc(sizeof *copy);
    if (!copy)
        return -ENOMEM;
    *copy = *command;
    copy->data = NULL;
    if (data && length) {
        if (!(copy->data = malloc(length))) {
            free(copy);
            return -ENOMEM;
        }
        memcpy(copy->data, data, length);
    }
    if (!post(engine, copy)) {
        if (copy->op == DO_DIRTY_DONE || copy->op == DO_FAILED || copy->op == DO_POOL_ADD)
            execute_ended(engine, copy);
        command_free(copy);
    }
    return 0;
}

static void arm_event(struct vm_engine *engine)
{
    struct io_uring_sqe *sqe = next_sqe(engine);
    io_uring_prep_read(sqe, engine->event_fd, &engine->event_value, sizeof engine->event_value, 0);
    io_uring_sqe_set_data64(sqe, DATA_EVENT);
}

static void completed(struct vm_engine *engine, uint64_t data, int result)
{
    if ((data & 3) == DATA_TAG) {
        ublk_cqe(engine, data >> 2, result);
    } else if ((data & 3) == DATA_EVENT) {
        arm_event(engine);
        run_commands(engine);
    } else {
        piece_done(engine, (struct piece *)(uintptr_t)data, result);
    }
}

static void run_ready(struct vm_engine *engine)
{
    struct request *request;
    do {
        while ((request = list_pop(&engine->ready)))
            request_run(engine, request);
        // After all that ran, so that they share one.  The ends of rounds may let others run.
        sync_round(engine);
        drain_check(engine);
    } while (engine->ready.first);
}

static bool idle(struct vm_engine *engine)
{
    return !engine->requests && !engine->flying[0] && !engine->flying[1];
}

static int create_ring(struct vm_engine *engine)
{
    struct io_uring_params params = {.cq_entries = RING_COMPLETIONS};
    params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN
                   | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    int error = io_uring_queue_init_params(RING_ENTRIES, &engine->ring, &params);
    if (error != -EINVAL)
        return error;
    params = (struct io_uring_params){.flags = IORING_SETUP_CQSIZE, .cq_entries = RING_COMPLETIONS};
    return io_uring_queue_init_params(RING_ENTRIES, &engine->ring, &params);
}

// What came too late for the loop.  Under the lock, so that nobody is beside us in execute(); and
// who is answered here finds the life ended.
static void end(struct vm_engine *engine)
{
    struct command *command;
    pthread_mutex_lock(&engine->lock);
    engine->life = ENDED;
    while ((command = engine->commands)) {
        engine->commands = command->next;
        if (command->op == DO_SERVE)
            command->result = -ESHUTDOWN;
        else if (command->op != DO_DRAIN)
            execute(engine, command);
        if (command->waits)
            sem_post(&command->done);
        else
            command_free(command);
    }
    pthread_cond_broadcast(&engine->faults_ready);
    pthread_mutex_unlock(&engine->lock);
}

int vm_engine_run(struct vm_engine *engine)
{
    int error = create_ring(engine);
    if (error < 0) {
        engine->stopping = true;
        end(engine);
        return error;
    }
    pthread_mutex_lock(&engine->lock);
    engine->life = RUNNING;
    pthread_mutex_unlock(&engine->lock);
    arm_event(engine);
    run_commands(engine);
    for (;;) {
        struct io_uring_cqe *cqe;
        unsigned head, seen = 0;
        run_ready(engine);
        if (engine->stopping && idle(engine))
            break;
        int result = io_uring_submit_and_wait(&engine->ring, 1);
        if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY)
            abort();  // completions are lost: as in next_sqe(), and better than requests that hang
        io_uring_for_each_cqe(&engine->ring, head, cqe) {
            completed(engine, cqe->user_data, cqe->res);
            seen++;
        }
        io_uring_cq_advance(&engine->ring, seen);
    }
    // Commands parked in the kernel end with the ring; then the device may be closed.
    io_uring_queue_exit(&engine->ring);
    ublk_close(engine);
    end(engine);
    return 0;
}

void vm_engine_stop(struct vm_engine *engine)
{
    struct command command = {.op = DO_STOP};
    post_copy(engine, &command, NULL, 0);
}

int vm_fill(struct vm_engine *engine, uint64_t id, const uint64_t *entries, uint32_t count, int error)
{
    struct command command = {.op = DO_FILL, .id = id, .count = count, .error = error};
    return post_copy(engine, &command, error ? NULL : entries, count * sizeof *entries);
}

int vm_inflated(struct vm_engine *engine, uint64_t id, uint64_t offset, const void *data,
                uint64_t length, int error)
{
    struct command command = {
        .op = DO_INFLATED, .id = id, .offset = offset, .length = length, .error = error};
    return post_copy(engine, &command, error ? NULL : data, length);
}

int vm_pool_add(struct vm_engine *engine, uint32_t file, uint64_t host_offset, uint64_t count, int reused)
{
    struct command command = {.op = DO_POOL_ADD, .file = file, .offset = host_offset,
                              .length = count, .flags = reused != 0};
    return post_copy(engine, &command, NULL, 0);
}

int vm_answer(struct vm_engine *engine, uint64_t id, int error)
{
    struct command command = {.op = DO_ANSWER, .id = id, .error = error};
    return post_copy(engine, &command, NULL, 0);
}

int vm_dirty_take(struct vm_engine *engine, struct vm_dirty *ret, uint32_t max)
{
    struct command command = {.op = DO_DIRTY_TAKE, .data = ret, .count = max};
    return post_and_wait(engine, &command);
}

int vm_dirty_done(struct vm_engine *engine, int error)
{
    struct command command = {.op = DO_DIRTY_DONE, .error = error};
    return post_copy(engine, &command, NULL, 0);
}

int vm_drain(struct vm_engine *engine)
{
    struct command command = {.op = DO_DRAIN};
    return post_and_wait(engine, &command);
}

int vm_pool_take(struct vm_engine *engine, struct vm_range *ret, uint32_t *ret_files, uint32_t max)
{
    struct command command = {.op = DO_POOL_TAKE, .data = ret, .data2 = ret_files, .count = max};
    return post_and_wait(engine, &command);
}

int vm_set_failed(struct vm_engine *engine, int error)
{
    struct command command = {.op = DO_FAILED, .error = error};
    return post_copy(engine, &command, NULL, 0);
}

int vm_stats(struct vm_engine *engine, struct vm_stats *ret)
{
    struct command command = {.op = DO_STATS, .data = ret};
    return post_and_wait(engine, &command);
}

int vm_ublk_serve(struct vm_engine *engine, int cdev_fd, uint32_t depth, uint32_t max_io,
                  uint32_t mode)
{
    struct command command = {
        .op = DO_SERVE, .id = cdev_fd, .count = depth, .length = max_io, .flags = mode};
    return post_and_wait(engine, &command);
}

static int one_io(struct vm_engine *engine, uint32_t op, uint64_t offset, uint64_t length, void *data,
                  uint32_t flags)
{
    struct call call = {.request = {.op = op,
                                    .origin = FROM_CALL,
                                    .mover = IN_MEMORY,
                                    .fua = flags & VM_IO_FUA,
                                    .nounmap = flags & VM_IO_NOUNMAP,
                                    .offset = offset,
                                    .length = length,
                                    .buf = data}};
    struct command *command = calloc(1, sizeof *command);
    if (!command)
        return -ENOMEM;
    *command = (struct command){.op = DO_IO, .data = &call};
    call.request.owner = &call;
    sem_init(&call.done, 0, 0);
    bool posted = post(engine, command);
    if (!posted)
        free(command);
    while (posted && sem_wait(&call.done) && errno == EINTR)
        ;
    sem_destroy(&call.done);
    return posted ? call.request.error : -ESHUTDOWN;
}

int vm_io(struct vm_engine *engine, uint32_t op, uint64_t offset, uint64_t length, void *data,
          uint32_t flags)
{
    bool data_op = op == VM_OP_READ || op == VM_OP_WRITE;
    int error = 0;
    // Of the whole, before a part of it is written.
    if (length > engine->config.size || offset > engine->config.size - length
        || (offset | length) % 512)
        return -EINVAL;
    if (!data_op || length <= MAX_IO)
        return one_io(engine, op, offset, length, data, flags);
    for (uint64_t at = 0; at < length && !error; at += MAX_IO) {
        uint64_t step = length - at < MAX_IO ? length - at : MAX_IO;
        error = one_io(engine, op, offset + at, step, (uint8_t *)data + at, flags);
    }
    return error;
}
