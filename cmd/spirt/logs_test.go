package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/events"
)

// logsOf opens logs with these contents, of peers from 1.
func logsOf(t testing.TB, contents ...string) (logs *peerLogs, add func(peer int, text string)) {
	t.Helper()
	dir := t.TempDir()
	var processes []spirt.PeerProcess
	for i := range contents {
		processes = append(processes, spirt.PeerProcess{Peer: i + 1})
		if err := os.MkdirAll(filepath.Dir(spirt.PeerLog(dir, i+1)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	add = func(peer int, text string) {
		f, err := os.OpenFile(spirt.PeerLog(dir, peer), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	for i, text := range contents {
		add(i+1, text)
	}
	logs, err := openLogs(dir, processes, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(logs.close)
	return logs, add
}

// merged returns what is written of logs by now.
func merged(t testing.TB, logs *peerLogs) string {
	t.Helper()
	var b bytes.Buffer
	out := &lineWriter{w: bufio.NewWriter(&b), last: -1}
	if err := out.pump(t.Context(), func() error { return logs.merge(t.Context(), out) }, false); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What is written later, also the end of a line, is told once.
func TestLogsFollow(t *testing.T) {
	logs, add := logsOf(t, "time=2026-01-01T00:00:02Z b\ntime=2026-01-01T00:00:03Z un", "time=2026-01-01T00:00:01Z a\n")
	if got, want := merged(t, logs), "peer 2 | time=2026-01-01T00:00:01Z a\npeer 1 | time=2026-01-01T00:00:02Z b\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := merged(t, logs); got != "" {
		t.Errorf("again: %q", got)
	}
	add(2, "time=2026-01-01T00:00:04Z d\n")
	add(1, "finished\n")
	if got, want := merged(t, logs), "peer 1 | time=2026-01-01T00:00:03Z unfinished\npeer 2 | time=2026-01-01T00:00:04Z d\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// A line has a bound, and only the last lines are kept where only these are
// wanted.
func TestLogsBounded(t *testing.T) {
	long := strings.Repeat("x", 3*maxLogLine)
	logs, _ := logsOf(t, long+"\nafter\n")
	lines := strings.Split(merged(t, logs), "\n")
	if len(lines) != 3 || len(lines[0]) > maxLogLine+20 || lines[1] != "peer 1 | after" {
		t.Errorf("%d lines, the first of %d bytes", len(lines), len(lines[0]))
	}
	for _, last := range []int{0, 1, 3, 7, 100} {
		var b bytes.Buffer
		out := &lineWriter{w: bufio.NewWriter(&b), last: last}
		n, want := 0, ""
		for i := max(0, 20-last); i < 20; i++ {
			want += strconv.Itoa(i) + "\n"
		}
		err := out.pump(t.Context(), func() error {
			for ; n < 20; n++ {
				if err := out.line(strconv.Itoa(n)); err != nil {
					return err
				}
				if len(out.ring) > last {
					t.Errorf("%d lines in memory, %d are wanted", len(out.ring), last)
				}
			}
			return nil
		}, false)
		if err != nil || b.String() != want {
			t.Errorf("the last %d of 20: %q, %v", last, &b, err)
		}
	}
}

// Whatever a peer or a function wrote, each line becomes one, without control
// characters.
func FuzzLogs(f *testing.F) {
	f.Add("time=2026-01-01T00:00:02Z level=INFO msg=a\n\x1b[2Jb\r\n", "time=x\ntime=\n\n")
	f.Add("\x9b31m\u202e\n", "\xff\xfe\n")
	f.Fuzz(func(t *testing.T, one, two string) {
		logs, _ := logsOf(t, one, two)
		got := merged(t, logs)
		if n, want := strings.Count(got, "\n"), strings.Count(one, "\n")+strings.Count(two, "\n"); n != want {
			t.Errorf("%d lines, want %d", n, want)
		}
		for line := range strings.SplitSeq(strings.TrimSuffix(got, "\n"), "\n") {
			if line != clean(line) {
				t.Errorf("control characters in %q", line)
			}
		}
	})
}

// Whatever stands in an event log, it is told in one line.
func FuzzEventText(f *testing.F) {
	f.Add([]byte(`{"event":"warning","peer":1,"message":"a\nb\u001b[2J"}`))
	f.Add([]byte(`{"event":"invocation","invocation":{"task":"gradient","error":"x"}}`))
	f.Add([]byte(`{"event":"invocation"}`))
	f.Add([]byte(`{"event":"waiting","members":[1,2,3],"step":"gather"}`))
	f.Add([]byte(`{"event":"\u0000","message":"m"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var e events.Event
		if json.Unmarshal(line, &e) != nil {
			return
		}
		if text := clean(eventText(&e)); text != clean(text) || strings.Contains(text, "\n") {
			t.Errorf("%q", text)
		}
	})
}
