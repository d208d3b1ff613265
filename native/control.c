/* One ublk control command, through a ring of its own: they need SQEs of 128 bytes, and may block. */
#include <errno.h>
#include <string.h>

#include "internal.h"

#define PAYLOAD 32  // struct ublksrv_ctrl_cmd

int vm_ublk_control(int control_fd, uint32_t cmd_op, void *payload)
{
    struct io_uring ring;
    struct io_uring_cqe *cqe;
    int result = io_uring_queue_init(4, &ring, IORING_SETUP_SQE128);
    if (result < 0)
        return result;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, control_fd, NULL, 0, 0);
    sqe->cmd_op = cmd_op;
    memcpy(sqe->cmd, payload, PAYLOAD);
    do
        result = io_uring_submit(&ring);
    while (result == -EINTR || result == -EAGAIN);
    if (result == 1) {
        do
            result = io_uring_wait_cqe(&ring, &cqe);
        while (result == -EINTR);
        if (!result)
            result = cqe->res;
    } else if (result >= 0) {
        result = -EIO;
    }
    io_uring_queue_exit(&ring);
    return result;
}
