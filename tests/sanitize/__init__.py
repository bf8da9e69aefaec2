"""The engine under the sanitizers, without Python in the process: see driver.c."""
