package main

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt"
)

// Exit codes tell bad usage from what failed; nothing but events and answers
// goes to standard output.
func TestExitCodes(t *testing.T) {
	exists := t.TempDir()
	none := filepath.Join(exists, "none")
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"version", spirt.ExitDone, ""},
		{"train --help", spirt.ExitDone, ""},
		{"train --no-such-flag", spirt.ExitUsage, "unknown flag"},
		{"fly", spirt.ExitUsage, "unknown command"},
		{"train extra", spirt.ExitUsage, "no such file"},
		{"train --resume " + exists, spirt.ExitUsage, "no run folder"},
		{"train --resume " + exists + " --rounds 5 --prices x", spirt.ExitUsage, "leave out --prices, --rounds"},
		{"train --budget-usd -1 --run " + none, spirt.ExitUsage, "--budget-usd"},
		{"train --min-delta 0.1 --run " + none, spirt.ExitUsage, "patience"},
		{"train --model resnet18 --run " + none, spirt.ExitUsage, "resnet18"},
		{"train --data idx:" + none + " --run " + none, spirt.ExitUsage, "none"},
		{"train --peers 0 --run " + none, spirt.ExitUsage, "not positive"},
		{"train --target-accuracy 97 --run " + none, spirt.ExitUsage, "fraction"},
		{"train --run " + exists, spirt.ExitUsage, "exists"},
		{"peer", spirt.ExitUsage, "--peer"},
		{"peer --run " + none + " --peer 1", spirt.ExitFailed, "none"},
		{"function", spirt.ExitUsage, "AWS_LAMBDA_RUNTIME_API"},
		{"simulate --peers 1025", spirt.ExitUsage, "1 to 1024"},
		{"simulate --byzantine 2", spirt.ExitUsage, "at most 1"},
		{"simulate --calm", spirt.ExitUsage, "--rounds"},
		{"simulate --trace", spirt.ExitUsage, "--scenario"},
		{"simulate --scenario " + none, spirt.ExitUsage, "none"},
		{"simulate --scenario x --seed 3", spirt.ExitUsage, "leave out --seed"},
		{"db extra", spirt.ExitUsage, "takes no argument"},
		{"db --dir none", spirt.ExitUsage, "--open"},
		{"db --memory 4", spirt.ExitUsage, "512MiB"},
		{"db --listen 0.0.0.0:0 --dir " + none, spirt.ExitUsage, "--tls-cert"},
		{"db --listen unix:" + exists + " --open --dir none", spirt.ExitFailed, "not a socket"},
		{"eval", spirt.ExitUsage, "--run"},
		{"eval --run " + none, spirt.ExitFailed, "none"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(c.args), &stdout, &stderr)
		if code != c.code || !strings.Contains(stderr.String(), c.says) {
			t.Errorf("spirt %s: exit code %d, want %d; standard error: %s", c.args, code, c.code, &stderr)
		}
		if lines := strings.Count(stderr.String(), "\n"); c.code != spirt.ExitDone && (lines != 1 || stdout.Len() > 0) {
			t.Errorf("spirt %s: %d lines of error, standard output %q", c.args, lines, &stdout)
		}
	}
}

// What went wrong besides an interruption is told, and changes no exit code.
func TestInterruptedBesides(t *testing.T) {
	var stderr bytes.Buffer
	err := errors.Join(spirt.ErrInterrupted, fmt.Errorf("round 7: %w", errors.Join(nil, errors.New("no space left on device"))))
	if code := report(&stderr, err); code != spirt.ExitInterrupted || stderr.String() != "spirt: interrupted\nspirt: round 7: no space left on device\n" {
		t.Errorf("exit code %d, %q", code, &stderr)
	}
	stderr.Reset()
	if report(&stderr, errors.Join(spirt.ErrInterrupted, nil)); stderr.String() != "spirt: interrupted\n" {
		t.Errorf("%q", &stderr)
	}
}
