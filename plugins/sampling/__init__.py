"""Temperature, top-p, draws and their random numbers, on the device."""
