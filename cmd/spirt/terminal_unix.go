//go:build unix

package main

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// terminal is one that a picture is drawn on.
type terminal struct {
	fd        int
	continued chan os.Signal // this process was stopped and goes on

	mu    sync.Mutex
	modes *unix.Termios // as they were, while keys are not echoed
}

// openTerminal prepares a terminal, or returns nil if it cannot be drawn on.
func openTerminal(f *os.File) *terminal {
	t := &terminal{fd: int(f.Fd()), continued: make(chan os.Signal, 1)}
	signal.Notify(t.continued, syscall.SIGCONT)
	return t
}

// foreground reports whether the terminal is this process's to draw on, not
// that of a shell or another program.
func (t *terminal) foreground() bool {
	group, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp() // not the controlling terminal: nobody else's
}

// quiet stops the echo of keys, which would shift the picture. Keys that send
// signals go on doing so.
func (t *terminal) quiet() {
	t.mu.Lock()
	defer t.mu.Unlock()
	modes, err := unix.IoctlGetTermios(t.fd, getModes)
	if err != nil {
		return
	}
	if t.modes == nil {
		kept := *modes
		t.modes = &kept
	}
	modes.Lflag &^= unix.ECHO
	_ = unix.IoctlSetTermios(t.fd, setModes, modes)
}

// restore undoes quiet.
func (t *terminal) restore() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.modes == nil || !t.foreground() { // from the background it would stop this process
		return
	}
	_ = unix.IoctlSetTermios(t.fd, setModes, t.modes)
	t.modes = nil
}

func (t *terminal) close() {
	signal.Stop(t.continued)
	t.restore()
}
