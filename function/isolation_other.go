//go:build !linux

package function

import "os/exec"

// isolator keeps instances from what is not theirs: here it cannot.
type isolator struct{}

func newIsolator(Config) (*isolator, error) { return nil, errNotIsolated }

func (*isolator) String() string { return "none" }

func (*isolator) close() {}

func (*isolator) prepare(*exec.Cmd, *output, string) (*cell, error) { return nil, nil }

// cell is what one instance has of its own.
type cell struct{}

func (*cell) start(cmd *exec.Cmd) error { return cmd.Start() }

func (*cell) close() {}

func isMainThread() bool { return false }

// Isolates says what keeps instances of this process apart from what is not theirs; empty: nothing.
func Isolates() string { return "" }
