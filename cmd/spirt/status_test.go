//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spirt-ml/spirt"
)

// spirtOf runs a command in this process.
func spirtOf(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func statusOf(t *testing.T, dir string) (code int, r statusReport) {
	t.Helper()
	code, stdout, stderr := spirtOf(t, "status", dir, "--json")
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("status: %v\n%s%s", err, stdout, stderr)
	}
	return code, r
}

// The peers of a run whose starter was killed are found and stopped, and the
// run tells how it goes on.
func TestStopOrphans(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--peers", "3", "--rounds", "1000000")
	r.round(1, 5)
	if _, s := statusOf(t, r.dir); s.Starter != r.cmd.Process.Pid {
		t.Errorf("the starter is process %d, status says %d", r.cmd.Process.Pid, s.Starter)
	}
	r.cmd.Process.Kill()
	r.cmd.Wait()

	code, s := statusOf(t, r.dir)
	if code != spirt.ExitDone || s.State != "running" || s.Round < 5 || s.Starter != 0 || len(s.Peers) != 3 || s.Loss == nil {
		t.Errorf("exit code %d, %+v", code, s)
	}
	for _, p := range s.Peers {
		if !p.Running || p.PID != r.pids[p.Peer] || p.State != "started" {
			t.Errorf("%+v, want process %d", p, r.pids[p.Peer])
		}
	}
	_, picture, _ := spirtOf(t, "status", r.dir)
	if want := fmt.Sprintf("1 (%d), 2 (%d), 3 (%d)", r.pids[1], r.pids[2], r.pids[3]); !strings.Contains(picture, want) || !strings.Contains(picture, "s/round") {
		t.Errorf("no %q in\n%s", want, picture)
	}

	code, stdout, stderr := spirtOf(t, "stop", r.dir, "--peer", "2", "--timeout", "1m")
	if want := fmt.Sprintf("peer 2 (process %d) stopped\n", r.pids[2]); code != 0 || stdout != want {
		t.Errorf("exit code %d, %q, want %q; %s", code, stdout, want, stderr)
	}
	code, s = statusOf(t, r.dir)
	if s.Peers[1].Running || !s.Peers[0].Running || s.Peers[1].State != "stopped" || code != 0 || !strings.Contains(s.Resume, "--peer 2") {
		t.Errorf("exit code %d, %+v", code, s)
	}

	// One that does not obey is killed.
	if err := syscall.Kill(r.pids[3], syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = spirtOf(t, "stop", r.dir, "--peer", "3", "--timeout", "1ms")
	if code != 0 || !strings.Contains(stdout, "killed: it had not stopped within 1ms") {
		t.Errorf("exit code %d, %s%s", code, stdout, stderr)
	}
	code, stdout, stderr = spirtOf(t, "stop", r.dir)
	if code != 0 || !strings.Contains(stdout, "peer 1 ") {
		t.Errorf("exit code %d, %s%s", code, stdout, stderr)
	}
	for n, pid := range r.pids {
		if syscall.Kill(pid, 0) == nil && !zombie(pid) {
			t.Errorf("peer %d still runs", n)
		}
	}
	code, s = statusOf(t, r.dir)
	if code != spirt.ExitFailed || s.State != "interrupted" || s.Resume != "spirt train --resume "+r.dir {
		t.Errorf("exit code %d, %+v", code, s)
	}
	code, stdout, _ = spirtOf(t, "stop", r.dir)
	if code != 0 || !strings.Contains(stdout, "no peer of") {
		t.Errorf("exit code %d, %s", code, stdout)
	}
}

// A run whose processes were all killed is dead.
func TestStatusDead(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--peers", "2", "--rounds", "1000000")
	r.round(1, 2)
	r.cmd.Process.Kill()
	r.cmd.Wait()
	if code, stdout, stderr := spirtOf(t, "stop", r.dir, "--now"); code != 0 || !strings.Contains(stdout, "peer 2 (process") || !strings.Contains(stdout, ") killed\n") {
		t.Errorf("exit code %d, %s%s", code, stdout, stderr)
	}
	// As if nobody had told that they were killed.
	dropEvents(t, r.dir, `"state":"stopped"`)
	code, s := statusOf(t, r.dir)
	if code != spirt.ExitFailed || s.State != "dead" || s.Peers[0].State != "gone" {
		t.Errorf("exit code %d, %+v", code, s)
	}
	code, _, stderr := spirtOf(t, "status", r.dir)
	if code != spirt.ExitFailed || !strings.Contains(stderr, "the run is dead") || !strings.Contains(stderr, "spirt train --resume") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}

// Watching shows the rounds and ends with the run.
func TestStatusWatch(t *testing.T) {
	r := startTrain(t, "--model", "mlp", "--peers", "2", "--rounds", "60")
	r.round(1, 2)
	watched := make(chan string)
	go func() { // ends with the run
		_, stdout, stderr := spirtOf(t, "status", r.dir, "--watch")
		watched <- stdout + stderr
	}()
	r.done()
	got := <-watched
	if !strings.Contains(got, "training mlp on mnist-10k") || !strings.HasSuffix(got, "\ndone\n") {
		t.Errorf("%s", got)
	}
}

// dropEvents removes the events that have a text from a run.
func dropEvents(t *testing.T, dir, text string) {
	t.Helper()
	path := filepath.Join(dir, "events.jsonl")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var kept []byte
	for line := range bytes.Lines(b) {
		if !bytes.Contains(line, []byte(text)) {
			kept = append(kept, line...)
		}
	}
	if err := os.WriteFile(path, kept, 0o644); err != nil {
		t.Fatal(err)
	}
}
