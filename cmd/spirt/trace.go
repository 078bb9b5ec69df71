package main

import (
	"os"
	"path/filepath"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/trace"
)

// trainTraces has a run's rounds sent to the collector that the environment
// names, until stop. The run goes on also where that is not possible.
func trainTraces(cfg *spirt.TrainConfig, say func(format string, args ...any)) (stop func()) {
	to, err := trace.FromEnviron(os.Getenv)
	if err != nil {
		say("no traces are sent: %v", err)
	}
	if to == nil {
		return func() {}
	}
	var x *trace.Exporter
	note := func(err error) {
		if err != nil {
			say("%v", err)
		}
	}
	before := cfg.OnEvent
	cfg.OnEvent = func(e spirt.Event, line []byte) {
		before(e, line)
		if x == nil { // the run folder is there by now
			to.Run, to.Job, to.Version = filepath.Base(cfg.Dir), cfg.Dir, spirt.Version()
			if info, err := spirt.ReadRun(cfg.Dir); err == nil && info.JobID != "" {
				to.Job = info.JobID
			}
			x = trace.New(*to)
		}
		note(x.Add(&e))
	}
	return func() {
		if x != nil {
			note(x.Close())
		}
	}
}
