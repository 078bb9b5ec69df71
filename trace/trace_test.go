package trace

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/events"
)

func start() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

func at(seconds float64) string {
	return strconv.FormatInt(start().Add(time.Duration(seconds*float64(time.Second))).UnixNano(), 10)
}

// collector takes spans, and has them by name and peer.
type collector struct {
	t       *testing.T
	answer  string
	headers http.Header
	all     map[string]map[string]any
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Method != "POST" || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/json" {
		c.t.Error(err, r.Method, r.URL, r.Header)
	}
	c.headers = r.Header
	var got struct {
		ResourceSpans []struct {
			ScopeSpans []struct{ Spans []map[string]any }
		}
	}
	if err := json.Unmarshal(body, &got); err != nil {
		c.t.Error(err)
	}
	for _, s := range got.ResourceSpans[0].ScopeSpans[0].Spans {
		attributes := map[string]any{}
		for _, a := range s["attributes"].([]any) {
			a := a.(map[string]any)
			for _, v := range a["value"].(map[string]any) {
				attributes[a["key"].(string)] = v
			}
		}
		s["attributes"] = attributes
		c.all[s["name"].(string)+" "+attributes["spirt.peer"].(string)] = s
	}
	io.WriteString(w, c.answer)
}

func example() []*events.Event {
	loss := 0.5
	return []*events.Event{
		{Event: "run", Time: start()},
		{Event: "invocation", Peer: 1, Time: start().Add(time.Second), Invocation: &events.Invocation{Task: "gradient", Round: 7, Minibatch: 2, Attempt: 1, Cold: true, MS: 750, MemoryMB: 128, Instance: 99}},
		{Event: "invocation", Peer: 2, Time: start().Add(time.Second), Invocation: &events.Invocation{Task: "gradient", Round: 7, Attempt: 2, MS: 250, Error: "Runtime.ExitError"}},
		{Event: "round", Peer: 1, Round: 7, Loss: &loss, Seconds: 2, Time: start().Add(2 * time.Second), Steps: []events.Step{{Step: "compute", At: 0, MS: 1500}, {Step: "gather", At: 1500, MS: 500}}},
		{Event: "round", Peer: 2, Round: 7, Seconds: 1, Time: start().Add(3 * time.Second)},
		{Event: "round", Peer: 3, Round: 8, Seconds: 1e300, Time: start()},
		{Event: "round", Peer: maxPeers + 1, Round: 8, Time: start()},
		{Event: "invocation", Peer: 1, Time: start()},
	}
}

func TestSpans(t *testing.T) {
	c := &collector{t: t, answer: `{"partialSuccess":{}}`, all: map[string]map[string]any{}}
	s := httptest.NewServer(c)
	defer s.Close()
	cfg, err := FromEnviron(func(k string) string {
		return map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": s.URL, "OTEL_EXPORTER_OTLP_HEADERS": "Token=a%20b, other = c"}[k]
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Job = "abc"
	x := New(*cfg)
	for _, e := range example() {
		if err := x.Add(e); err != nil {
			t.Error(err)
		}
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if c.headers.Get("Token") != "a b" || c.headers.Get("Other") != "c" {
		t.Error(c.headers)
	}
	if len(c.all) != 7 {
		t.Fatalf("%d spans: %v", len(c.all), c.all)
	}
	const trace = "94369342f9ee549aafda7bc82106580c" // of the SHA-256 of "abc 7": other machines find the same
	for name, want := range map[string][2]string{
		"round 1": {at(0), at(2)}, "round 2": {at(2), at(3)}, "compute 1": {at(0), at(1.5)}, "gather 1": {at(1.5), at(2)},
		"gradient 1": {at(0.25), at(1)}, "gradient 2": {at(0.75), at(1)},
	} {
		got := c.all[name]
		if got["startTimeUnixNano"] != want[0] || got["endTimeUnixNano"] != want[1] || got["traceId"] != trace || len(got["spanId"].(string)) != 16 {
			t.Errorf("%s: %v, want %v of %s", name, got, want, trace)
		}
		var parent any
		if !strings.HasPrefix(name, "round") {
			parent = c.all["round "+name[len(name)-1:]]["spanId"]
		}
		if got["parentSpanId"] != parent {
			t.Errorf("%s is below %v, want %v", name, got["parentSpanId"], parent)
		}
	}
	if other := c.all["round 3"]; other["traceId"] == trace || other["startTimeUnixNano"] != at(0) {
		t.Errorf("%v", other)
	}
	attributes := c.all["gradient 1"]["attributes"].(map[string]any)
	for key, want := range map[string]any{"faas.coldstart": true, "faas.invocation_id": "1-7-2-1", "faas.max_memory": "134217728", "faas.instance": "99"} {
		if attributes[key] != want {
			t.Errorf("%s is %v, want %v", key, attributes[key], want)
		}
	}
	if got := c.all["round 1"]["attributes"].(map[string]any)["spirt.loss"]; got != 0.5 {
		t.Errorf("loss %v", got)
	}
	if got, ok := c.all["gradient 2"]["status"].(map[string]any); !ok || got["code"] != 2.0 || got["message"] != "Runtime.ExitError" {
		t.Errorf("status %v", got)
	}
	if got := c.all["gradient 1"]["status"]; got != nil {
		t.Errorf("status %v", got)
	}
}

// What is lost is told once, and a run never waits for it.
func TestLost(t *testing.T) {
	failing := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	defer failing.Close()
	partial := httptest.NewServer(&collector{t: t, answer: `{"partialSuccess":{"rejectedSpans":"1","errorMessage":"too old"}}`, all: map[string]map[string]any{}})
	defer partial.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for _, c := range []struct{ url, want string }{
		{failing.URL, "403"}, {partial.URL + "/v1/traces", "too old"}, {gone.URL, "dial"},
	} {
		x := New(Config{URL: c.url})
		var told []error
		for _, e := range example() {
			if err := x.Add(e); err != nil {
				told = append(told, err)
			}
		}
		if err := x.Close(); err != nil {
			told = append(told, err)
		}
		if len(told) != 1 || !strings.Contains(told[0].Error(), c.want) {
			t.Errorf("%s: told %v, want %s once", c.url, told, c.want)
		}
	}
}

// A collector that never answers holds up nobody.
func TestStuck(t *testing.T) {
	stuck := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-stuck }))
	defer slow.Close()
	defer close(stuck)
	x := New(Config{URL: slow.URL})
	told := 0
	for range maxQueue { // of three spans each
		if x.Add(example()[3]) != nil {
			told++
		}
	}
	x.cancel() // as Close does after 3 s
	if x.Close() != nil {
		told++
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
}

func TestFromEnviron(t *testing.T) {
	for _, c := range []struct {
		env       map[string]string
		url, want string
	}{
		{map[string]string{}, "", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/x/"}, "http://a:4318/x/v1/traces", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://b/c"}, "https://b/c", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "true"}, "", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, "", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://a/v1/traces", ""},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "", "OTEL_EXPORTER_OTLP_PROTOCOL=http/json"},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "a:4317"}, "", "OTEL_EXPORTER_OTLP_ENDPOINT is no URL"},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_HEADERS": "secret"}, "", "is no list such as"},
	} {
		cfg, err := FromEnviron(func(k string) string { return c.env[k] })
		switch {
		case c.want != "":
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v: %v, want %s", c.env, err, c.want)
			}
		case err != nil, (cfg == nil) != (c.url == ""), cfg != nil && cfg.URL != c.url:
			t.Errorf("%v: %+v, %v", c.env, cfg, err)
		}
	}
}

func FuzzRefused(f *testing.F) {
	f.Add([]byte(`{"partialSuccess":{"rejectedSpans":"1","errorMessage":"x"}}`))
	f.Add([]byte(`{"partialSuccess":{"rejectedSpans":[]}}`))
	f.Add([]byte(`<html>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := refused(b); err != nil && (!json.Valid(b) || len(err.Error()) > 2*maxText) {
			t.Errorf("%q: %v", b, err)
		}
	})
}
