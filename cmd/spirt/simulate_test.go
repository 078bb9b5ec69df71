package main

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/sim"
)

// A seed that breaks a property ends the command with exit code 1, and leaves
// a scenario that breaks it again.
func TestSimulateViolation(t *testing.T) {
	t.Chdir(t.TempDir())
	s := simulation{Exploration: sim.Exploration{Peers: 4, Byzantine: 1, First: 7, Seeds: 5}}
	s.New = func(c round.Config) (*round.Machine, error) {
		if c.Self == 2 {
			return nil, errors.New("out of order")
		}
		return round.New(c)
	}
	var stdout, stderr bytes.Buffer
	err := s.explore(t.Context(), &stdout, &stderr)
	if code := report(&stderr, err); code != spirt.ExitFailed {
		t.Errorf("exit code %d", code)
	}
	if !strings.HasPrefix(stdout.String(), "VIOLATION: ") {
		t.Errorf("standard output: %s", &stdout)
	}
	for _, want := range []string{"spirt: seed 7 at ", "out of order", "spirt simulate --scenario spirt-seed-7.scenario --trace"} {
		if !strings.Contains(stderr.String(), want) {
			t.Errorf("no %q in %s", want, &stderr)
		}
	}
	text, err := os.ReadFile("spirt-seed-7.scenario")
	if err != nil || !bytes.Contains(text, []byte("out of order")) {
		t.Errorf("scenario: %s, %v", text, err)
	}
	s.scenario = "spirt-seed-7.scenario"
	stdout.Reset()
	if err := s.replay(t.Context(), &stdout); err == nil || !strings.Contains(err.Error(), "out of order") {
		t.Errorf("the replay: %v", err)
	}
	s.New = nil
	if err := s.replay(t.Context(), &stdout); err != nil {
		t.Errorf("with a good machine: %v", err)
	}
}
