package program

// MaybeConfine makes this process the program that Start has it started for, and does not return then; in any other process
// it does nothing. Call it first in main, and in TestMain of packages that start programs.
func MaybeConfine() {}
