package metrics

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

func example() *Run {
	r := New(bill.Default())
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	loss, accuracy := 0.5, 0.75
	for _, e := range []events.Event{
		{Event: "peer", Peer: 1, State: "started"},
		{Event: "peer", Peer: 2, State: "odd\x1b"},
		{Event: "invocation", Peer: 1, Invocation: &events.Invocation{BilledMS: 100, MemoryMB: 1024, MS: 90}},
		{Event: "invocation", Peer: 1, Invocation: &events.Invocation{BilledMS: 50, MemoryMB: 1024, Error: "x"}},
		{Event: "round", Peer: 1, Round: 3, Loss: &loss, Seconds: 2, Samples: 64, Instances: 2, Steps: []events.Step{{Step: "compute", MS: 1500}}, Traffic: []events.Traffic{{Peer: 2, In: 10, Out: 20}}},
		{Event: "round", Peer: 2, Round: 1, Loss: &loss},
		{Event: "validation", Peer: 1, Round: 1, Accuracy: &accuracy, Loss: &loss},
		{Event: "warning", Peer: 1, Cause: "bad\x1b\xff" + strings.Repeat("x", 500)},
	} {
		e.Time = at
		r.Add(&e)
	}
	return r
}

func TestValues(t *testing.T) {
	for name, want := range map[string]string{
		"spirt_round":                           "# HELP spirt_round Highest round that a peer has finished.\n# TYPE spirt_round gauge\nspirt_round 3\n",
		"spirt_peer_lag_rounds":                 "# HELP spirt_peer_lag_rounds Rounds that a peer is behind the one in front.\n# TYPE spirt_peer_lag_rounds gauge\nspirt_peer_lag_rounds{peer=\"1\"} 0\nspirt_peer_lag_rounds{peer=\"2\"} 2\n",
		"spirt_sent_bytes_total":                "# HELP spirt_sent_bytes_total Bytes that a peer sent to another.\n# TYPE spirt_sent_bytes_total counter\nspirt_sent_bytes_total{peer=\"1\",to=\"2\"} 20\n",
		"spirt_function_gigabyte_seconds_total": "# HELP spirt_function_gigabyte_seconds_total Billed time of functions times their memory in GiB.\n# TYPE spirt_function_gigabyte_seconds_total counter\nspirt_function_gigabyte_seconds_total{peer=\"1\"} 0.15\nspirt_function_gigabyte_seconds_total{peer=\"2\"} 0\n",
		"spirt_validation_accuracy_ratio":       "# HELP spirt_validation_accuracy_ratio Accuracy of the last validated model, from 0 to 1.\n# TYPE spirt_validation_accuracy_ratio gauge\nspirt_validation_accuracy_ratio 0.75\n",
	} {
		if err := testutil.GatherAndCompare(example().Gatherer(), strings.NewReader(want), name); err != nil {
			t.Error(err)
		}
	}
}

// Names and help follow Prometheus' conventions, and its own parser reads the
// answer, also of a run without events.
func TestFormat(t *testing.T) {
	problems, err := testutil.GatherAndLint(example().Gatherer())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, r := range []*Run{example(), New(bill.Default())} {
		w := httptest.NewRecorder()
		r.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if w.Code != 200 || strings.Contains(w.Body.String(), "\x1b") {
			t.Fatalf("%d: %s", w.Code, w.Body)
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(w.Body)
		if err != nil || families["spirt_done"] == nil {
			t.Errorf("%v: %v", families, err)
		}
	}
}
