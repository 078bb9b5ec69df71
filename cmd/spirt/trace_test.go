package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/spirt-ml/spirt"
)

// A run sends a trace of each round, with every peer's part, steps and
// invocations in it.
func TestTrainTraces(t *testing.T) {
	type span struct{ TraceID, SpanID, ParentSpanID, Name string }
	var mu sync.Mutex
	var spans []span
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var got struct {
			ResourceSpans []struct {
				ScopeSpans []struct{ Spans []span }
			}
		}
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = json.Unmarshal(b, &got)
		}
		if err != nil {
			t.Error(err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		spans = append(spans, got.ResourceSpans[0].ScopeSpans[0].Spans...)
	}))
	defer s.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", s.URL)
	var stderr bytes.Buffer
	dir := filepath.Join(t.TempDir(), "run")
	if code := run(t.Context(), []string{"train", "--model", "logistic", "--peers", "2", "--rounds", "5", "--run", dir}, io.Discard, &stderr); code != 0 {
		t.Fatal(stderr.String())
	}
	if strings.Contains(stderr.String(), "traces") {
		t.Error(stderr.String())
	}
	mu.Lock()
	defer mu.Unlock()
	traces, rounds, below := map[string]bool{}, map[string]bool{}, map[string]int{}
	for _, s := range spans {
		if s.Name == "round" {
			traces[s.TraceID] = true
			rounds[s.SpanID] = true
		}
	}
	for _, s := range spans {
		if s.Name != "round" && rounds[s.ParentSpanID] {
			below[s.Name]++
		}
	}
	tail, err := spirt.EventsOf(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tail.Close()
	told, toldRounds, steps, invocations := map[uint64]bool{}, 0, 0, 0
	err = tail.Each(func(e *spirt.Event) {
		switch e.Event {
		case "round":
			told[e.Round] = true
			toldRounds++
			steps += len(e.Steps)
		case "invocation":
			if e.Invocation.Round > 0 {
				invocations++
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(told) < 5 || invocations == 0 || steps == 0 {
		t.Fatalf("%d rounds, %d invocations, %d steps", len(told), invocations, steps)
	}
	if len(traces) != len(told) || len(spans) != toldRounds+steps+invocations {
		t.Errorf("%d traces of %d spans; want %d of %d rounds of peers, %d steps and %d invocations", len(traces), len(spans), len(told), toldRounds, steps, invocations)
	}
	if below["gradient"] == 0 || below["compute"] == 0 {
		t.Errorf("below rounds: %v", below)
	}
}
