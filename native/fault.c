/* Questions to Python: queued here, taken by vm_faults_wait, answered through engine.c. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "internal.h"

static void queue(struct vm_engine *engine, const struct vm_fault *ask)
{
    // A copy for Python; the original stays with the loop until it is answered.
    struct fault *copy = calloc(1, sizeof *copy);
    if (!copy)
        abort();  // a lost question would hang its request for ever
    copy->ask = *ask;
    pthread_mutex_lock(&engine->lock);
    *(engine->faults ? &engine->faults_last->next : &engine->faults) = copy;
    engine->faults_last = copy;
    pthread_cond_signal(&engine->faults_ready);
    pthread_mutex_unlock(&engine->lock);
    engine->stats.faults[0]++;
    engine->stats.faults[ask->type]++;
}

uint64_t fault_ask(struct vm_engine *engine, uint32_t type, uint64_t offset, uint64_t length,
                   uint64_t arg, struct request *request)
{
    struct fault *fault = calloc(1, sizeof *fault);
    if (!fault)
        abort();
    fault->ask = (struct vm_fault){++engine->next_id, type, 0, offset, length, arg};
    fault->request = request;
    fault->next = engine->asked;
    engine->asked = fault;
    queue(engine, &fault->ask);
    return fault->ask.id;
}

void fault_tell(struct vm_engine *engine, uint32_t type, uint64_t offset, uint64_t length,
                uint64_t arg)
{
    struct vm_fault ask = {0, type, 0, offset, length, arg};
    queue(engine, &ask);
}

struct fault *fault_take(struct vm_engine *engine, uint64_t id)
{
    for (struct fault **at = &engine->asked; *at; at = &(*at)->next) {
        struct fault *fault = *at;
        if (fault->ask.id == id) {
            *at = fault->next;
            return fault;
        }
    }
    return NULL;
}

struct fault *fault_find(struct vm_engine *engine, uint32_t type, uint64_t offset)
{
    for (struct fault *fault = engine->asked; fault; fault = fault->next)
        if (fault->ask.type == type && fault->ask.offset == offset)
            return fault;
    return NULL;
}

int vm_faults_wait(struct vm_engine *engine, struct vm_fault *ret, uint32_t max, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    if (timeout_ms > 0) {
        until.tv_nsec += (timeout_ms % 1000) * 1000000L;
        until.tv_sec += timeout_ms / 1000 + until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
    }
    pthread_mutex_lock(&engine->lock);
    int timed_out = 0;
    while (!engine->faults && engine->life != ENDED && !timed_out) {
        if (timeout_ms < 0)
            pthread_cond_wait(&engine->faults_ready, &engine->lock);
        else
            timed_out = pthread_cond_timedwait(&engine->faults_ready, &engine->lock, &until);
    }
    int count = 0;
    while (engine->faults && count < (int)max) {
        struct fault *fault = engine->faults;
        engine->faults = fault->next;
        ret[count++] = fault->ask;
        free(fault);
    }
    if (!count && engine->life == ENDED)
        count = -ESHUTDOWN;
    pthread_mutex_unlock(&engine->lock);
    return count;
}
