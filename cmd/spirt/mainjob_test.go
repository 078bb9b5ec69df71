//go:build integration && unix

package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// buildSpirt builds the program as users run it: without the race detector.
func buildSpirt(t *testing.T) string {
	t.Helper()
	exe := filepath.Join(t.TempDir(), "spirt")
	if out, err := exec.Command("go", "build", "-o", exe, ".").CombinedOutput(); err != nil {
		t.Fatalf("building spirt: %v\n%s", err, out)
	}
	return exe
}

const promised = 0.97 // accuracy of the main job on the test images

// The job that `spirt train` runs when told nothing else reaches what the
// README promises, whatever the seed.
func TestMainJob(t *testing.T) {
	exe := buildSpirt(t)
	for seed := 1; seed <= 5; seed++ {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := startTrainOf(t, exe, "--seed", fmt.Sprint(seed))
			done := r.done()
			r.sameModel(done)
			if done.Rounds != 400 || *done.Accuracy < promised {
				t.Errorf("accuracy %.4f after %d rounds", *done.Accuracy, done.Rounds)
			}
			t.Logf("accuracy %.4f, %.1f s, %d timeouts", *done.Accuracy, done.Seconds, done.Timeouts)
		})
	}
}

// The main job loses a peer half-way.
func TestMainJobLosesPeer(t *testing.T) {
	r := startTrainOf(t, buildSpirt(t))
	r.round(1, 200)
	syscall.Kill(r.pids[2], syscall.SIGKILL)
	done := r.done()
	r.sameModel(done, 2)
	if done.Rounds != 400 || *done.Accuracy < promised {
		t.Errorf("accuracy %.4f after %d rounds", *done.Accuracy, done.Rounds)
	}
	noticed(t, r, 2, 1, 3, 4)
}
