// Package trace sends the rounds of a run to an OpenTelemetry collector.
//
// FromEnviron reads the standard variables and returns nil where none names a
// collector; nothing is made then. Give each event of the run to Exporter.Add
// and call Close.
//
// A round is a trace, whose ID follows from the job and the round: what several
// machines send of one round comes together. In it a peer's round is a span,
// with a span for each step and each invocation below. They are sent as
// OTLP/HTTP in JSON, from a goroutine of their own. A run is never delayed: what
// a collector does not take, or not in time, is dropped, and that is told once.
package trace

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spirt-ml/spirt/events"
)

// Limits of an Exporter.
const (
	maxQueue    = 8192 // spans
	maxBatch    = 512
	sendEvery   = time.Second
	sendTimeout = 10 * time.Second
	closeWithin = 3 * time.Second
	maxAnswer   = 64 << 10
	maxPeers    = 256
	maxText     = 1 << 10 // bytes of an attribute
	maxSeconds  = 1e8
	maxNumber   = 1 << 53
)

// Config says where spans go.
type Config struct {
	URL     string            // all of it, with the path
	Headers map[string]string // of each request, such as a token
	Service string            // "" is spirt
	Job     string            // what the IDs of traces follow from: the job's ID
	Run     string            // what the run is called
	Version string            // of the program
}

// FromEnviron returns what the variables of the OpenTelemetry specification
// say, nil if they name no collector: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and
// OTEL_EXPORTER_OTLP_ENDPOINT, their _HEADERS and _PROTOCOL, OTEL_SERVICE_NAME,
// OTEL_TRACES_EXPORTER and OTEL_SDK_DISABLED.
func FromEnviron(getenv func(string) string) (*Config, error) {
	either := func(name string) (key, value string) {
		key = "OTEL_EXPORTER_OTLP_TRACES_" + name
		if value = getenv(key); value == "" {
			key = "OTEL_EXPORTER_OTLP_" + name
			value = getenv(key)
		}
		return key, value
	}
	key, endpoint := either("ENDPOINT")
	if endpoint == "" || strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true") || getenv("OTEL_TRACES_EXPORTER") == "none" {
		return nil, nil
	}
	if k, protocol := either("PROTOCOL"); protocol != "" && !strings.HasPrefix(protocol, "http/") {
		return nil, fmt.Errorf("%s is %.20q: traces go over HTTP only: name the collector's port for it, usually 4318, and set %s=http/json", k, protocol, k)
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s is no URL such as http://127.0.0.1:4318", key)
	}
	if key == "OTEL_EXPORTER_OTLP_ENDPOINT" {
		u = u.JoinPath("v1", "traces")
	}
	cfg := &Config{URL: u.String(), Headers: map[string]string{}, Service: getenv("OTEL_SERVICE_NAME")}
	key, headers := either("HEADERS")
	for pair := range strings.SplitSeq(headers, ",") {
		if strings.TrimSpace(pair) == "" {
			continue
		}
		name, value, ok := strings.Cut(pair, "=")
		value, err := url.PathUnescape(strings.TrimSpace(value))
		if name = strings.TrimSpace(name); !ok || err != nil || name == "" {
			return nil, fmt.Errorf("%s is no list such as name=value,name=value", key) // which may be secret
		}
		cfg.Headers[name] = value
	}
	return cfg, nil
}

// Exporter sends the spans of a run. Add and Close are called from one
// goroutine.
type Exporter struct {
	cfg    Config
	salt   []byte // tells the spans of two starts apart
	made   uint64 // spans
	told   bool
	queue  chan span
	cancel context.CancelFunc
	ended  chan struct{}

	dropped atomic.Int64
	failed  atomic.Pointer[error] // the first failure to send
}

// New starts an exporter, which Close ends.
func New(cfg Config) *Exporter {
	if cfg.Service == "" {
		cfg.Service = "spirt"
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &Exporter{
		cfg: cfg, salt: binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano())),
		queue: make(chan span, maxQueue), cancel: cancel, ended: make(chan struct{}),
	}
	go x.send(ctx)
	return x
}

// Add takes the next event of the run. It never waits. It returns an error
// the first time that spans were lost, and nil from then on.
func (x *Exporter) Add(e *events.Event) error {
	if e.Peer >= 1 && e.Peer <= maxPeers && !e.Time.IsZero() {
		switch {
		case e.Event == "round" && e.Round > 0:
			x.round(e)
		case e.Event == "invocation" && e.Invocation != nil && e.Invocation.Round > 0:
			x.invocation(e)
		}
	}
	return x.lost()
}

// lost says once that spans were lost.
func (x *Exporter) lost() error {
	failed, dropped := x.failed.Load(), x.dropped.Load()
	if x.told || failed == nil && dropped == 0 {
		return nil
	}
	x.told = true
	if failed != nil {
		return fmt.Errorf("sending traces: %w", *failed)
	}
	return fmt.Errorf("sending traces: the collector is too slow, %d spans were dropped", dropped)
}

// Close sends what is left, within 3 seconds. It returns an error if spans were
// lost and Add has not said so.
func (x *Exporter) Close() error {
	late := time.AfterFunc(closeWithin, x.cancel)
	defer late.Stop()
	close(x.queue)
	<-x.ended
	x.cancel()
	return x.lost()
}

// traceID names a round of the job.
func (x *Exporter) traceID(round uint64) string {
	sum := sha256.Sum256([]byte(x.cfg.Job + " " + strconv.FormatUint(round, 10)))
	return hex.EncodeToString(sum[:16])
}

// roundID names the span of a peer's round, also before that has ended.
func (x *Exporter) roundID(peer int, round uint64) string {
	return x.spanID(fmt.Sprintf("round %d %d", peer, round))
}

func (x *Exporter) newID() string {
	x.made++
	return x.spanID("span " + strconv.FormatUint(x.made, 10))
}

func (x *Exporter) spanID(of string) string {
	sum := sha256.Sum256([]byte(string(x.salt) + of))
	return hex.EncodeToString(sum[:8])
}

// round makes the span of a peer's round, and those of its steps.
func (x *Exporter) round(e *events.Event) {
	began := after(e.Time, -e.Seconds)
	s := span{
		Trace: x.traceID(e.Round), ID: x.roundID(e.Peer, e.Round), Name: "round", Kind: kindInternal,
		Start: nanos(began), End: nanos(e.Time),
		Attributes: []attribute{
			whole("spirt.peer", int64(e.Peer)), whole("spirt.round", int64(min(e.Round, maxNumber))), whole("spirt.slot", int64(min(e.Slot, maxNumber))),
			text("spirt.how", e.How), text("spirt.model", e.Model), whole("spirt.members", int64(len(e.Members))),
			whole("spirt.samples", int64(e.Samples)), {"spirt.degraded", value{Bool: &e.Degraded}},
		},
	}
	if e.Loss != nil {
		s.Attributes = append(s.Attributes, attribute{"spirt.loss", value{Double: e.Loss}})
	}
	if e.Spent != nil {
		usd := e.Spent.CostUSD.Dollars()
		s.Attributes = append(s.Attributes, attribute{"spirt.cost_usd", value{Double: &usd}})
	}
	x.put(s)
	for _, step := range e.Steps[:min(len(e.Steps), 2*len(events.Steps))] {
		from := after(began, step.At/1000)
		x.put(span{
			Trace: s.Trace, ID: x.newID(), Parent: s.ID, Name: cut(step.Step), Kind: kindInternal,
			Start: nanos(from), End: nanos(after(from, step.MS/1000)),
			Attributes: []attribute{whole("spirt.peer", int64(e.Peer))},
		})
	}
}

// invocation makes the span of an attempt of a function.
func (x *Exporter) invocation(e *events.Event) {
	i := *e.Invocation // what is sent later
	s := span{
		Trace: x.traceID(i.Round), ID: x.newID(), Parent: x.roundID(e.Peer, i.Round), Name: cut(i.Task), Kind: kindClient,
		Start: nanos(after(e.Time, -i.MS/1000)), End: nanos(e.Time),
		Attributes: []attribute{
			text("faas.invoked_name", i.Task), {"faas.coldstart", value{Bool: &i.Cold}},
			text("faas.invocation_id", fmt.Sprintf("%d-%d-%d-%d", e.Peer, i.Round, i.Minibatch, i.Attempt)),
			whole("faas.max_memory", int64(i.MemoryMB)<<20), text("faas.instance", strconv.Itoa(i.Instance)),
			whole("spirt.peer", int64(e.Peer)), whole("spirt.minibatch", int64(i.Minibatch)), whole("spirt.attempt", int64(i.Attempt)),
			{"spirt.queue_ms", value{Double: &i.QueueMS}}, {"spirt.init_ms", value{Double: &i.InitMS}}, whole("spirt.billed_ms", i.BilledMS),
		},
	}
	if i.Error != "" {
		s.Attributes = append(s.Attributes, text("error.type", i.Error))
		s.Status = &status{Code: statusError, Message: cut(i.Error)}
	}
	x.put(s)
}

// put hands a span on, unless the collector is far behind.
func (x *Exporter) put(s span) {
	select {
	case x.queue <- s:
	default:
		x.dropped.Add(1)
	}
}

// send posts spans until the queue is closed and empty.
func (x *Exporter) send(ctx context.Context) {
	defer close(x.ended)
	client := &http.Client{
		Timeout:       sendTimeout,
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // headers may be secret
	}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(sendEvery)
	defer tick.Stop()
	var batch []span
	post := func() {
		if len(batch) > 0 {
			if err := x.post(ctx, client, batch); err != nil {
				x.dropped.Add(int64(len(batch)))
				x.failed.CompareAndSwap(nil, &err)
			}
		}
		batch = batch[:0]
	}
	for {
		select {
		case <-tick.C:
			post()
		case s, ok := <-x.queue:
			if !ok {
				post()
				return
			}
			if batch = append(batch, s); len(batch) >= maxBatch {
				post()
			}
		}
	}
}

// post sends one request.
func (x *Exporter) post(ctx context.Context, client *http.Client, batch []span) error {
	r := resource{[]attribute{text("service.name", x.cfg.Service), text("service.version", x.cfg.Version), text("spirt.run", x.cfg.Run), text("spirt.job", x.cfg.Job)}}
	body, err := json.Marshal(request{[]resourceSpans{{r, []scopeSpans{{scope{"github.com/spirt-ml/spirt/trace", x.cfg.Version}, batch}}}}})
	if err != nil {
		return err
	}
	q, err := http.NewRequestWithContext(ctx, http.MethodPost, x.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	q.Header.Set("Content-Type", "application/json")
	for name, v := range x.cfg.Headers {
		q.Header.Set(name, v)
	}
	answer, err := client.Do(q)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	says, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", q.URL.Redacted(), answer.Status)
	}
	return refused(says)
}

// refused returns an error if a collector says that it did not take all spans.
func refused(answer []byte) error {
	var a struct {
		PartialSuccess struct {
			RejectedSpans any    `json:"rejectedSpans"` // a number, or one as text
			ErrorMessage  string `json:"errorMessage"`
		} `json:"partialSuccess"`
	}
	if json.Unmarshal(answer, &a) != nil { // it took them, whatever it says
		return nil
	}
	if n := a.PartialSuccess.RejectedSpans; n != nil && n != 0.0 && n != "0" && n != "" {
		return errors.New("the collector refused spans: " + cut(a.PartialSuccess.ErrorMessage))
	}
	return nil
}

// after returns the time so many seconds after at, before it for a negative
// number. Nonsense is 0 seconds.
func after(at time.Time, seconds float64) time.Time {
	if !(seconds > -maxSeconds && seconds < maxSeconds) {
		return at
	}
	return at.Add(time.Duration(seconds * float64(time.Second)))
}

func nanos(t time.Time) string { return strconv.FormatInt(max(t.UnixNano(), 0), 10) }

func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "") }

// What is sent, as opentelemetry/proto/trace/v1/trace.proto has it in JSON: IDs
// in hexadecimal, 64-bit numbers as text.
type (
	request struct {
		ResourceSpans []resourceSpans `json:"resourceSpans"`
	}
	resourceSpans struct {
		Resource   resource     `json:"resource"`
		ScopeSpans []scopeSpans `json:"scopeSpans"`
	}
	resource struct {
		Attributes []attribute `json:"attributes"`
	}
	scopeSpans struct {
		Scope scope  `json:"scope"`
		Spans []span `json:"spans"`
	}
	scope struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
	}
	span struct {
		Trace      string      `json:"traceId"`
		ID         string      `json:"spanId"`
		Parent     string      `json:"parentSpanId,omitempty"`
		Name       string      `json:"name"`
		Kind       int         `json:"kind"`
		Start      string      `json:"startTimeUnixNano"`
		End        string      `json:"endTimeUnixNano"`
		Attributes []attribute `json:"attributes"`
		Status     *status     `json:"status,omitempty"`
	}
	status struct {
		Message string `json:"message,omitempty"`
		Code    int    `json:"code"`
	}
	attribute struct {
		Key   string `json:"key"`
		Value value  `json:"value"`
	}
	value struct {
		String *string  `json:"stringValue,omitempty"`
		Bool   *bool    `json:"boolValue,omitempty"`
		Int    *string  `json:"intValue,omitempty"`
		Double *float64 `json:"doubleValue,omitempty"`
	}
)

const (
	kindInternal = 1
	kindClient   = 3
	statusError  = 2
)

func text(key, s string) attribute {
	s = cut(s)
	return attribute{key, value{String: &s}}
}

func whole(key string, n int64) attribute {
	s := strconv.FormatInt(n, 10)
	return attribute{key, value{Int: &s}}
}
