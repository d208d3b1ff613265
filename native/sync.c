/* fdatasync of the top image's files, one round at a time: flushes that come while one runs share
 * the next, since the one that runs may not cover what they are about.  Two at once would be wrong
 * as well as slow: the kernel tells a failed write-back to one of them only. */
#include "internal.h"

void sync_ask(struct vm_engine *engine, struct request *request)
{
    request_park(engine, request, WAIT_SYNC, 0);
    engine->sync_wanted = true;
}

static void end_round(struct vm_engine *engine)
{
    struct request_list done = engine->syncing;
    struct request *request;
    engine->syncing = (struct request_list){0};
    while ((request = list_pop(&done)))
        request_answered(engine, request, 0);
}

void sync_round(struct vm_engine *engine)
{
    if (!engine->sync_wanted || engine->sync_pieces)
        return;
    engine->sync_wanted = false;
    engine->syncing = requests_take(engine, WAIT_SYNC, 0);
    for (uint32_t i = 0; engine->syncing.first && !engine->failed && i < engine->file_count; i++) {
        if (!engine->files[i].owned)
            continue;
        struct piece *piece = piece_new(engine, PIECE_SYNC);
        piece->file = i;
        engine->sync_pieces++;
        piece_submit(engine, piece);
    }
    if (!engine->sync_pieces)
        end_round(engine);
}

void sync_piece_done(struct vm_engine *engine, int error)
{
    // Reported once by the kernel, so nothing later may claim to be durable.
    if (error)
        engine_fail(engine, error);
    if (!--engine->sync_pieces)
        end_round(engine);
}
