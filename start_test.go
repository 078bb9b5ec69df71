package spirt

import (
	"github.com/spirt-ml/spirt/events"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
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
