package spirt

import (
	"fmt"
	"github.com/spirt-ml/spirt/events"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/tensordb"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A run whose peers cannot be started says so, also in its folder.
func TestPeersCannotBeStarted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	_, err := Train(t.Context(), Job{Model: "logistic", Rounds: 1}, TrainConfig{Dir: dir, Executable: filepath.Join(dir, "none")})
	refused(t, err, "starting peer 1", "none")
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	check(t, err)
	if !strings.Contains(string(b), `"state": "failed"`) {
		t.Errorf("the run's record:\n%s", b)
	}
}

// A data set's folder is found again from another working folder.
func TestAbsoluteData(t *testing.T) {
	home, here := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("USERPROFILE", home) // where Windows looks
	t.Chdir(here)
	for name, want := range map[string]string{
		"mnist-10k":    "mnist-10k",
		"idx:":         "idx:",
		"idx:~/digits": "idx:" + filepath.Join(home, "digits"),
		"idx:../x":     "idx:" + filepath.Join(filepath.Dir(here), "x"),
		"idx:" + home:  "idx:" + home,
	} {
		if got := absoluteData(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// What a function says of its failure may be long; a warning is not.
func TestWarningIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), eventsFile)
	log, err := events.OpenLog(path)
	check(t, err)
	defer log.Close()
	p := &peer{n: 1, log: slog.New(slog.DiscardHandler), events: log}
	p.warn("minibatch 1 is left out: %s", strings.Repeat("€", 100<<10))
	tail, err := events.OpenTail(path)
	check(t, err)
	defer tail.Close()
	lines, got, err := tail.Next()
	check(t, err)
	if len(lines) != 1 || len(lines[0]) > 2*maxWarning || !strings.HasPrefix(got[0].Message, "minibatch 1 is left out: €") {
		t.Errorf("%d lines, the first of %d bytes: %.100s", len(lines), len(lines[0]), lines[0])
	}
}

// Warnings name what caused them and whom they are about, and a function that
// crashes for each minibatch tells its last output once.
func TestWarningsSayWhy(t *testing.T) {
	path := filepath.Join(t.TempDir(), eventsFile)
	log, err := events.OpenLog(path)
	check(t, err)
	defer log.Close()
	p := &peer{n: 1, log: slog.New(slog.DiscardHandler), events: log}
	crash := func(pid int) error {
		return fmt.Errorf("attempt 4 of 4: %w", &function.FunctionError{Type: function.TypeExit, Message: "exit status 2", Output: fmt.Sprintf("panic: no weights\n\ngoroutine 1, process %d", pid)})
	}
	p.warn("minibatch 1 is left out: %v", crash(77))
	p.warn("minibatch 2 is left out: %v", crash(78))
	p.warn("no checkpoint: %v", &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC})
	p.warn("no room: %v", fmt.Errorf("storing: %w", tensordb.ErrMemory))
	p.warn("minibatch 3: %v", &function.FunctionError{Type: function.TypeMemory, Message: "more than 512 MiB"})
	p.report(round.Report{Kind: round.BodyDropped, Peer: 2, Refused: true, Text: "not finite"})
	p.report(round.Report{Kind: round.BodyDropped, Peer: 2, Text: "could not be had"})
	tail, err := events.OpenTail(path)
	check(t, err)
	defer tail.Close()
	_, got, err := tail.Next()
	check(t, err)
	want := []struct {
		cause string
		about int
		says  string
	}{
		{events.CauseFunction, 0, "no weights"}, {events.CauseFunction, 0, "exit status 2; its last output was as before"}, {events.CauseDisk, 0, "no space left"},
		{events.CauseMemory, 0, "storing"}, {events.CauseMemory, 0, "more than 512 MiB"}, {events.CauseRefused, 3, "not finite"}, {events.CauseProtocol, 3, "could not"},
	}
	if len(got) != len(want) {
		t.Fatalf("%d warnings, want %d", len(got), len(want))
	}
	for i, w := range want {
		if e := got[i]; e.Event != "warning" || e.Cause != w.cause || e.About != w.about || !strings.Contains(e.Message, w.says) || i == 1 && strings.Contains(e.Message, "no weights") {
			t.Errorf("warning %d: cause %q about %d: %s", i, e.Cause, e.About, e.Message)
		}
	}
}
