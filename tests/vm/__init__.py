"""Run a command under a Debian kernel in QEMU, over the host's root file system.

`machine.run` for tests, `python3 -m tests.vm` for people.  The parts:

    archive.py    a private apt: what kernels there are, their packages
    kernels.py    the cache of unpacked kernels; names such as "newest"
    initramfs.py  what the guest starts from (init.sh is its script)
    programs.py   what must be installed
    machine.py    one run: QEMU, its disks, the command's output and status
"""
