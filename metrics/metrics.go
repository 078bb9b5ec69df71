// Package metrics shows a run to Prometheus.
//
// Make a Run, give each event of the run to Run.Add, and serve Run.Handler.
// Metrics are made from what the events tell when somebody asks for them; a run
// that nobody watches pays for nothing but the events.View. There is a registry of its own
// for each Run: metrics of the process, or of other libraries, are not in it.
//
// Labels are peers, steps, causes of faults and kinds of cost, of which a View holds
// a bounded number; pairs of peers are bounded by MaxPairs.
package metrics

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// MaxPairs bounds the pairs of peers whose traffic is shown one by one: those
// of 64 peers.
const MaxPairs = 64 * 64

// States are those that a peer may be in; any other one is "unknown".
func states() []string {
	return []string{"started", "finished", "stopped", "failed", "crashed", "lost", "expelled", "unknown"}
}

// Run is what is known of one run. It is safe for concurrent use.
type Run struct {
	prices *bill.Table

	mu   sync.Mutex
	view events.View
}

// New returns a Run without events, whose cost by kind follows from a table
// of prices.
func New(prices *bill.Table) *Run { return &Run{prices: prices} }

// Add takes the next event.
func (r *Run) Add(e *events.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.view.Add(e)
}

// Gatherer returns the metrics as they are when it is asked.
func (r *Run) Gatherer() prometheus.Gatherer {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(&collector{run: r, descs: newDescs()})
	return registry
}

// Handler answers scrapes.
func (r *Run) Handler() http.Handler {
	return promhttp.HandlerFor(r.Gatherer(), promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

type descs struct {
	rounds, final, loss, validationLoss, accuracy, samples, steps, invocations, cold, billed, gbSeconds, duration, queue, peak *prometheus.Desc
	received, sent, instances, faults, cost, state, peerRound, peerLoss, lag, roundSeconds, timeouts, elapsed, done            *prometheus.Desc
}

func newDescs() descs {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("spirt_"+name, help, labels, nil)
	}
	return descs{
		rounds:         d("round", "Highest round that a peer has finished."),
		final:          d("final_round", "Highest round that is final."),
		loss:           d("training_loss", "Mean loss over the peers' minibatches in the last round."),
		validationLoss: d("validation_loss", "Loss of the last validated model on the validation samples."),
		accuracy:       d("validation_accuracy_ratio", "Accuracy of the last validated model, from 0 to 1."),
		samples:        d("samples_total", "Samples that gradients were computed of, by all peers."),
		steps:          d("step_seconds_total", "Time spent in each step of a round, summed over rounds and peers.", "step"),
		invocations:    d("invocations_total", "Attempts of functions that have ended.", "peer", "result"),
		cold:           d("cold_starts_total", "Invocations that an instance was started for.", "peer"),
		duration:       d("invocation_seconds_total", "Time from handing over events to having results.", "peer"),
		queue:          d("invocation_queue_seconds_total", "Time that invocations waited for an instance.", "peer"),
		billed:         d("billed_seconds_total", "Billed time of functions.", "peer"),
		gbSeconds:      d("function_gigabyte_seconds_total", "Billed time of functions times their memory in GiB.", "peer"),
		peak:           d("function_peak_memory_bytes", "Most memory that an instance has taken.", "peer"),
		received:       d("received_bytes_total", "Bytes that a peer got from another.", "peer", "from"),
		sent:           d("sent_bytes_total", "Bytes that a peer sent to another.", "peer", "to"),
		instances:      d("instances", "Function instances that are alive.", "peer"),
		faults:         d("faults_total", "What went wrong, by cause.", "cause"),
		cost:           d("cost_usd_total", "Cost in US dollars by kind, of what was used so far.", "kind"),
		state:          d("peer_state", "1 for the state that a peer is in, 0 for others.", "peer", "state"),
		peerRound:      d("peer_round", "Last round that a peer has finished.", "peer"),
		peerLoss:       d("peer_training_loss", "Mean loss over a peer's minibatches in its last round.", "peer"),
		lag:            d("peer_lag_rounds", "Rounds that a peer is behind the one in front.", "peer"),
		roundSeconds:   d("peer_round_seconds", "Time that a peer's last round took.", "peer"),
		timeouts:       d("protocol_timeouts_total", "Timeouts of the round protocol that fired.", "peer"),
		elapsed:        d("elapsed_seconds", "Time from the first event to the last, without interruptions."),
		done:           d("done", "1 once the run is over."),
	}
}

type collector struct {
	run *Run
	descs
}

// Describe sends every description.
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	d := c.descs
	for _, x := range []*prometheus.Desc{d.rounds, d.final, d.loss, d.validationLoss, d.accuracy, d.samples, d.steps, d.invocations, d.cold, d.billed, d.gbSeconds, d.duration, d.queue, d.peak,
		d.received, d.sent, d.instances, d.faults, d.cost, d.state, d.peerRound, d.peerLoss, d.lag, d.roundSeconds, d.timeouts, d.elapsed, d.done} {
		to <- x
	}
}

// Collect makes the metrics, then sends them: who reads slowly holds up no
// event.
func (c *collector) Collect(to chan<- prometheus.Metric) {
	for _, m := range c.metrics() {
		to <- m
	}
}

func (c *collector) metrics() (all []prometheus.Metric) {
	c.run.mu.Lock()
	defer c.run.mu.Unlock()
	v := &c.run.view
	add := func(kind prometheus.ValueType, d *prometheus.Desc, value float64, labels ...string) {
		all = append(all, prometheus.MustNewConstMetric(d, kind, value, labels...))
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		add(prometheus.GaugeValue, d, value, labels...)
	}
	counter := func(d *prometheus.Desc, value float64, labels ...string) {
		add(prometheus.CounterValue, d, max(value, 0), labels...)
	}
	gauge(c.rounds, float64(v.Round))
	gauge(c.final, float64(v.Final))
	for _, s := range []struct {
		series *events.Series
		desc   *prometheus.Desc
	}{{&v.Loss, c.loss}, {&v.ValidationLoss, c.validationLoss}, {&v.Accuracy, c.accuracy}} {
		if _, last, ok := s.series.Last(); ok {
			gauge(s.desc, last)
		}
	}
	counter(c.samples, float64(v.Samples))
	for i, ms := range v.Steps {
		counter(c.steps, ms/1000, events.Steps[i])
	}
	cost := c.run.prices.Cost(v.Usage)
	for kind, m := range map[string]bill.Money{"functions": cost.Functions, "requests": cost.Requests, "peers": cost.Peers, "databases": cost.Databases, "transfer": cost.Transfer} {
		counter(c.cost, m.Dollars(), kind)
	}
	causes := map[string]int{}
	for cause, n := range v.Causes {
		causes[label(cause)] += n
	}
	for cause, n := range causes {
		counter(c.faults, float64(n), cause)
	}
	gauge(c.elapsed, v.Elapsed().Seconds())
	over := 0.0
	if v.Done != nil {
		over = 1
	}
	gauge(c.done, over)
	pairs := 0
	for _, p := range v.Peers {
		n := strconv.Itoa(p.Peer)
		state := p.State
		if !slices.Contains(states(), state) {
			state = "unknown"
		}
		for _, s := range states() {
			in := 0.0
			if s == state {
				in = 1
			}
			gauge(c.state, in, n, s)
		}
		f := p.Functions
		counter(c.invocations, float64(f.Invocations-f.Failed), n, "ok")
		counter(c.invocations, float64(f.Failed), n, "failed")
		counter(c.cold, float64(f.Cold), n)
		counter(c.duration, f.MS/1000, n)
		counter(c.queue, f.QueueMS/1000, n)
		counter(c.billed, float64(f.BilledMS)/1000, n)
		counter(c.gbSeconds, p.Usage.GBSeconds(), n)
		gauge(c.peak, float64(f.PeakMB)*(1<<20), n)
		gauge(c.instances, float64(p.Instances), n)
		gauge(c.peerRound, float64(p.Round), n)
		if p.Round > 0 {
			gauge(c.peerLoss, p.Loss, n)
			gauge(c.roundSeconds, p.Seconds, n)
		}
		gauge(c.lag, float64(v.Round-min(p.Round, v.Round)), n)
		counter(c.timeouts, float64(p.Timeouts), n)
		for other, in := range p.In {
			if pairs++; pairs > MaxPairs {
				break
			}
			counter(c.received, float64(in), n, strconv.Itoa(other))
			counter(c.sent, float64(p.Out[other]), n, strconv.Itoa(other))
		}
	}
	return all
}

// label returns a text from a file as the value of a label.
func label(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s[:min(len(s), 64)], "?"))
}
