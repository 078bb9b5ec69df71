package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt"
)

// The counters of a run that is resumed go on where they were.
func TestMetricsOfResumed(t *testing.T) {
	dir := t.TempDir()
	before := `{"event":"round","peer":1,"round":7,"members":[1],"ts":"2026-11-26T10:00:00Z"}` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "events.jsonl"), []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	told := 0
	cfg := spirt.TrainConfig{Dir: dir, OnEvent: func(spirt.Event, []byte) { told++ }}
	m := metricsFlags{at: "127.0.0.1:0"}
	at := ""
	stop, err := m.train(&cfg, true, func(format string, args ...any) { at = fmt.Sprintf(format, args...) })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	get := func() string {
		r, err := http.Get(strings.TrimPrefix(at, "metrics at "))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if b := get(); !strings.Contains(b, "\nspirt_round 7\n") {
		t.Errorf("before: %s", b)
	}
	cfg.OnEvent(spirt.Event{Event: "round", Peer: 1, Round: 8, Members: []int{1}}, nil)
	if b := get(); !strings.Contains(b, "\nspirt_round 8\n") || told != 1 {
		t.Errorf("afterwards, %d told: %s", told, b)
	}
}
