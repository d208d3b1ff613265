/* What the scenario tests share: the loop on a thread of its own, requests as jobs, and the test
 * itself as the Pager.  Nothing sleeps: a test waits for a fault, a result, or a count. */
#ifndef HARNESS_H
#define HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

#pragma GCC diagnostic ignored "-Wunused-function"

enum { KIB = 1 << 10, MIB = 1 << 20, PATIENCE_MS = 20000, MAX_FILES_OPEN = 16 };

static struct vm_engine *engine;
static pthread_t loop_thread;
static bool looping;
static int files[MAX_FILES_OPEN], file_count;

static void *run_loop(void *unused)
{
    assert(vm_engine_run(engine) == 0);
    return unused;
}

static int temporary(void)
{
    int fd = memfd_create("vm-test", MFD_CLOEXEC);
    assert(fd >= 0);
    return fd;
}

static int add_file(int fd, bool owned)
{
    assert(file_count < MAX_FILES_OPEN);
    files[file_count++] = fd;
    int number = vm_engine_add_file(engine, fd, -1, 0, owned);
    assert(number >= 0);
    return number;
}

static void create(const struct vm_config *config)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    alarm(100);  // what hangs is killed, and shows where in the core or the sanitizer's report
    file_count = 0;
    assert(vm_engine_create(config, &engine) == 0);
}

static void start_loop(void)
{
    looping = true;
    pthread_create(&loop_thread, NULL, run_loop, NULL);
}

static void join_loop(void)
{
    if (looping)
        pthread_join(loop_thread, NULL);
    looping = false;
}

static void destroy(void)
{
    vm_engine_destroy(engine);
    for (int i = 0; i < file_count; i++)
        close(files[i]);
}

static void finish_all(void)
{
    vm_engine_stop(engine);
    join_loop();
    destroy();
}

/* Requests */

struct job {
    pthread_t thread;
    uint32_t op, flags;
    uint64_t offset, length;
    void *data;
    int result;
};

static void *run_job(void *argument)
{
    struct job *job = argument;
    job->result = vm_io(engine, job->op, job->offset, job->length, job->data, job->flags);
    return NULL;
}

static struct job *issue(uint32_t op, uint64_t offset, uint64_t length, void *data, uint32_t flags)
{
    struct job *job = calloc(1, sizeof *job);
    *job = (struct job){.op = op, .flags = flags, .offset = offset, .length = length, .data = data};
    pthread_create(&job->thread, NULL, run_job, job);
    return job;
}

static int result_of(struct job *job)
{
    pthread_join(job->thread, NULL);
    int result = job->result;
    free(job);
    return result;
}

static struct vm_stats stats(void)
{
    struct vm_stats stats;
    assert(vm_stats(engine, &stats) == 0);
    return stats;
}

/* What was sent to the loop before is done, and the requests that it woke have run: a call is
 * answered before those, the next one after. */
static void settle(void)
{
    stats();
    stats();
}

/* Until count requests are not done: those have then walked as far as they can. */
static void until_in_flight(uint64_t count)
{
    while (stats().in_flight != count)
        sched_yield();
    settle();
}

/* Faults */

static struct vm_fault expect(uint32_t type)
{
    struct vm_fault fault = {0};
    int count = vm_faults_wait(engine, &fault, 1, PATIENCE_MS);
    if (count != 1 || fault.type != type) {
        fprintf(stderr, "fault %u expected, got %d: %u\n", type, count, fault.type);
        abort();
    }
    return fault;
}

/* The next fault; false once every request is done. */
static bool next_fault(struct vm_fault *ret)
{
    int count;
    while ((count = vm_faults_wait(engine, ret, 1, 5)) == 0 && stats().in_flight)
        ;
    return count == 1;
}

static void expect_none(void)
{
    struct vm_fault fault = {0};
    settle();
    int count = vm_faults_wait(engine, &fault, 1, 0);
    if (count > 0)
        fprintf(stderr, "no fault expected, got %u\n", fault.type);
    assert(count == 0 || count == -ESHUTDOWN);
}

/* Entries of a leaf, all alike but for the host offset, which follows the guest's. */
static void fill_alike(const struct vm_fault *fault, uint32_t units, uint32_t unit, uint32_t kind,
                       uint32_t source)
{
    uint64_t *entries = calloc(units, sizeof *entries);
    for (uint32_t i = 0; i < units; i++) {
        entries[i] = (uint64_t)kind << 60 | (uint64_t)source << 52;
        if (kind == VM_DATA || kind == VM_SHARED)
            entries[i] |= (fault->offset + (uint64_t)i * unit) >> 9;
    }
    assert(vm_fill(engine, fault->id, entries, units, 0) == 0);
    free(entries);
}

static void begin(void)
{
    struct vm_fault fault = expect(VM_FAULT_BEGIN);
    vm_answer(engine, fault.id, 0);
}

/* A pipe as a host file: reads wait for the test to write, writes for it to read. */
static void pipe_of(int *ret_ours, int *ret_theirs, bool read_by_engine)
{
    int ends[2];
    assert(pipe2(ends, O_CLOEXEC) == 0);
    *ret_ours = ends[read_by_engine];
    *ret_theirs = ends[!read_by_engine];
}

static bool all_bytes(const void *data, uint64_t length, uint8_t value)
{
    const uint8_t *bytes = data;
    return !length || (bytes[0] == value && !memcmp(bytes, bytes + 1, length - 1));
}

#endif
