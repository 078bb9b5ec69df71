//go:build unix

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt"
)

// A peer hangs while the others finish, and hangs on, or wakes when they have
// left: the run ends with the model of the others.
func TestFrozenPeer(t *testing.T) {
	t.Parallel() // it waits for most of its time
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, wakes := range map[string]bool{"hangs": false, "wakes": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const frozen = 3
			dir := filepath.Join(t.TempDir(), "run")
			pid, finished, stopped, warned := 0, 0, false, false
			tell := func(e spirt.Event, _ []byte) {
				switch {
				case e.Event == "peer" && e.State == "started" && e.Peer == frozen:
					pid = e.PID
				case e.Event == "round" && e.Round >= 10 && !stopped:
					stopped = true
					syscall.Kill(pid, syscall.SIGSTOP)
				case e.Event == "peer" && e.State == "finished":
					if finished++; finished == 3 && wakes {
						syscall.Kill(pid, syscall.SIGCONT)
					}
				case e.Event == "warning" && e.Peer == frozen:
					warned = warned || strings.Contains(e.Message, "it is stopped: ") || strings.Contains(e.Message, "another model than most peers")
				}
			}
			job := spirt.Job{Peers: 4, Byzantine: 1, Model: "logistic", Rounds: 40, CheckpointEvery: 64}
			done, err := spirt.Train(t.Context(), job, spirt.TrainConfig{Dir: dir, Executable: exe, Stragglers: 5 * time.Second, OnEvent: tell})
			if err != nil {
				t.Fatal(err)
			}
			if done.Rounds != 40 || done.StopReason != "rounds" || done.Accuracy == nil {
				t.Errorf("%+v", done)
			}
			alike := slices.DeleteFunc(slices.Clone(done.Peers), func(p spirt.PeerDone) bool { return p.Model != done.Model })
			if len(alike) != 3 || slices.ContainsFunc(alike, func(p spirt.PeerDone) bool { return p.Peer == frozen || p.State != "finished" }) {
				t.Errorf("%+v", done.Peers)
			}
			// One that wakes may train on alone, or wait for what it has heard of.
			if got := done.Peers[frozen-1].State; got == "finished" && !wakes {
				t.Errorf("the frozen peer ended as %s", got)
			}
			if !warned {
				t.Error("nobody was told of the frozen peer")
			}
			trained, err := spirt.ReadModel(filepath.Join(dir, "model.safetensors"))
			if err != nil {
				t.Fatal(err)
			}
			if got := trained.Hash().String(); got != done.Model {
				t.Errorf("the run folder has the model %s, the run ended with %s", got, done.Model)
			}
		})
	}
}
