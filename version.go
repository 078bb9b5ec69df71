package spirt

import (
	"runtime"
	"runtime/debug"
)

// version is the released version that this source leads to.
const version = "0.1.0"

// Version returns the version of this build, with the commit where the build
// knows it, and what it was built with.
func Version() string {
	v := version
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				v += "+" + s.Value[:12]
			}
		}
	}
	return v + " " + runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
}

// Exit codes of every command.
const (
	ExitDone        = 0
	ExitFailed      = 1
	ExitUsage       = 2
	ExitBudget      = 3
	ExitInterrupted = 130
)
