"""The encodings of control commands, against numbers and layouts of linux/ublk_cmd.h."""

import ctypes
import errno
import struct

import pytest

from virtmount.ublk.control import NEW_ID, Command, Control, DeviceInfo


@pytest.mark.parametrize(
    ("command", "value"),
    [  # as the preprocessor expands the UBLK_U_CMD_ names
        (Command.GET_DEV_INFO, 0x80207502),
        (Command.ADD_DEV, 0xC0207504),
        (Command.DEL_DEV, 0xC0207505),
        (Command.START_DEV, 0xC0207506),
        (Command.STOP_DEV, 0xC0207507),
        (Command.SET_PARAMS, 0xC0207508),
        (Command.GET_PARAMS, 0x80207509),
        (Command.GET_FEATURES, 0x80207513),
        (Command.TRY_STOP_DEV, 0xC0207517),
    ],
)
def test_opcode(command, value):
    assert command == value


def test_device_info_has_the_layout_of_the_kernel():
    info = DeviceInfo(
        depth=128,
        max_io=1 << 20,
        flags=1 << 40,
        tag=0x1122334455667788,
        queues=2,
        state=1,
        descriptor_size=64,
        device_id=7,
        pid=4711,
        owner_uid=3,
        owner_gid=4,
    )
    raw = info.pack()
    assert struct.unpack_from("=HHHH", raw, 0) == (2, 128, 1, 64)
    assert struct.unpack_from("=IIi", raw, 8) == (1 << 20, 7, 4711)
    assert struct.unpack_from("=QQII", raw, 24) == (1 << 40, 0x1122334455667788, 3, 4)
    assert len(raw) == 64
    assert DeviceInfo.unpack(raw) == info


class Kernel:
    """A driver that notes the commands and answers from a table."""

    def __init__(self, answers=None):
        self.answers = answers or {}
        self.sent = []

    def __call__(self, fd, command, payload):
        assert len(payload) == 32
        device_id, queue, length, address, data, path, pad, reserved = struct.unpack(
            "=IHHQQHHI", payload
        )
        assert (queue, path, pad, reserved) == (0xFFFF, 0, 0, 0)
        content = ctypes.string_at(address, length) if address else b""
        self.sent.append((Command(command), device_id, content, data))
        answer = self.answers.get(command)
        if isinstance(answer, int):
            raise OSError(answer, "whatever")
        if answer is not None:
            assert len(answer) == length
            ctypes.memmove(address, answer, length)
        return 0


@pytest.fixture
def control_with(tmp_path):
    path = tmp_path / "control"
    path.touch()
    opened = []

    def make(**answers):
        kernel = Kernel({Command[name]: answer for name, answer in answers.items()})
        opened.append(Control(kernel, str(path)))
        return opened[-1], kernel

    yield make
    for control in opened:
        control.close()


def test_features_are_read_from_the_buffer(control_with):
    control, _ = control_with(GET_FEATURES=(0xFFFFF).to_bytes(8, "little"))
    assert control.features() == 0xFFFFF


def test_add_answers_what_the_kernel_granted(control_with):
    granted = DeviceInfo(depth=64, max_io=4096, flags=0xC2, device_id=3)
    control, kernel = control_with(ADD_DEV=granted.pack())
    asked = DeviceInfo(depth=128, max_io=1 << 20, flags=0x40881)
    assert control.add(asked) == granted
    assert kernel.sent == [(Command.ADD_DEV, NEW_ID, asked.pack(), 0)]


def test_start_carries_the_process_inline(control_with):
    control, kernel = control_with()
    control.start(5, 4711)
    control.stop(5)
    control.delete(5)
    assert kernel.sent == [
        (Command.START_DEV, 5, b"", 4711),
        (Command.STOP_DEV, 5, b"", 0),
        (Command.DEL_DEV, 5, b"", 0),
    ]


def test_params_go_out_as_they_are(control_with):
    control, kernel = control_with()
    control.set_params(0, b"parameters")
    assert kernel.sent == [(Command.SET_PARAMS, 0, b"parameters", 0)]


def test_an_error_names_the_command_and_keeps_its_errno(control_with):
    control, _ = control_with(TRY_STOP_DEV=errno.EBUSY)
    with pytest.raises(OSError, match="ublk TRY_STOP_DEV: Device or resource busy") as caught:
        control.try_stop(1)
    assert caught.value.errno == errno.EBUSY
