package main

import (
	"os"

	"golang.org/x/sys/windows"
)

// terminal is one that a picture is drawn on.
type terminal struct {
	console   windows.Handle
	mode      uint32
	continued chan os.Signal // never: Windows stops no process
}

// openTerminal has a console obey escape sequences; it returns nil for one
// that cannot.
func openTerminal(f *os.File) *terminal {
	t := &terminal{console: windows.Handle(f.Fd())}
	if windows.GetConsoleMode(t.console, &t.mode) != nil ||
		windows.SetConsoleMode(t.console, t.mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING) != nil {
		return nil
	}
	return t
}

func (t *terminal) foreground() bool { return true }
func (t *terminal) quiet()           {}
func (t *terminal) restore()         {}
func (t *terminal) close()           { _ = windows.SetConsoleMode(t.console, t.mode) }
