//go:build integration && unix

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/spirt-ml/spirt"
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
	for seed := 1; seed <= 3; seed++ {
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

// PyTorch reads the model and finds what spirt finds.
func TestPyTorchReadsModel(t *testing.T) {
	r := startTrain(t, "--rounds", "40")
	r.done()
	want, err := spirt.Eval(r.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/bin/python3", "examples/pytorch_eval.py", r.dir, "dataset/mnist-10k", "8000")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: the test needs Debian's python3-torch", err)
	}
	var got spirt.Event
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	if math.Abs(*got.Accuracy-*want.Accuracy) > 1e-3 || math.Abs(*got.Loss-*want.Loss) > 1e-4 || got.Samples != want.Samples {
		t.Errorf("PyTorch says %s, spirt says accuracy %v, loss %v", out, *want.Accuracy, *want.Loss)
	}
}
