"""Virtual disk images as block devices."""
