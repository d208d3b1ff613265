/* Waiting until every piece that is in flight now has ended.  Pieces carry one of two epochs.  A
 * round begins a new epoch and lasts until no piece of the old one is left; who comes while a round
 * runs waits for the next. */
#include "internal.h"

static void begin_round(struct vm_engine *engine)
{
    engine->draining = true;
    engine->epoch = !engine->epoch;
    engine->drain_round++;
}

static uint64_t join_round(struct vm_engine *engine)
{
    if (engine->draining) {
        engine->drain_wanted = true;
        return engine->drain_round + 1;
    }
    begin_round(engine);
    return engine->drain_round;
}

void drain_request(struct vm_engine *engine, struct request *request)
{
    request_park(engine, request, WAIT_DRAIN, join_round(engine));
}

void drain_command(struct vm_engine *engine, struct command *command)
{
    command->id = join_round(engine);
    command->next = engine->drains;
    engine->drains = command;
}

static void end_round(struct vm_engine *engine)
{
    struct command *command, **at = &engine->drains;
    while ((command = *at)) {
        if (command->id == engine->drain_round) {
            *at = command->next;
            sem_post(&command->done);
        } else {
            at = &command->next;
        }
    }
    engine->draining = false;
    requests_wake(engine, WAIT_DRAIN, engine->drain_round, 0);
    if (engine->drain_wanted) {
        engine->drain_wanted = false;
        begin_round(engine);
    }
}

void drain_check(struct vm_engine *engine)
{
    while (engine->draining && !engine->flying[!engine->epoch])
        end_round(engine);
}
