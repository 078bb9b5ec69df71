package gradient

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

func newHandler(t testing.TB) *Handler {
	h := NewHandler(Config{Token: secret})
	t.Cleanup(func() { h.Close() })
	return h
}

func TestGradient(t *testing.T) {
	for _, name := range []string{"logistic", "lenet5"} {
		p := newPeer(t, name)
		check(t, p.db.Accumulator(prefix+"gradient", len(p.params), 3, 3))
		h := newHandler(t)
		sum := make([]float32, len(p.params))
		want := []struct {
			minibatch, n int
			status       string
		}{{1, 32, "buffered"}, {0, 16, "counted"}, {1, 32, "duplicate"}, {2, 32, "counted"}}
		for _, w := range want {
			r, err := h.Invoke(t.Context(), p.gradient(w.minibatch, w.n))
			check(t, err)
			loss, correct, _ := p.reference(rows(w.minibatch, w.n))
			if r.Loss != loss || r.Correct != correct || r.Samples != w.n || r.Status != w.status {
				t.Errorf("%s, minibatch %d: %+v, want loss %v, correct %d, %s", name, w.minibatch, r, loss, correct, w.status)
			}
			if r.Seconds.Read <= 0 || r.Seconds.Compute <= 0 || r.Seconds.Write <= 0 {
				t.Errorf("%s: seconds %+v", name, r.Seconds)
			}
		}
		for _, w := range want[1:3] { // minibatches 0 and 1, and 2 below, in this order
			_, _, g := p.reference(rows(w.minibatch, w.n))
			for i := range sum {
				sum[i] += g[i]
			}
		}
		_, _, g := p.reference(rows(2, 32))
		counted, err := p.db.Average(prefix+"average", prefix+"gradient")
		check(t, err)
		got := p.floats(t, prefix+"average")
		for i := range sum {
			if want := (sum[i] + g[i]) / 3; counted != 3 || math.Abs(float64(got[i]-want)) > 1e-6*(1+math.Abs(float64(want))) {
				t.Fatalf("%s: average[%d] of %d is %v, want %v", name, i, counted, got[i], want)
			}
		}
	}
}

func TestEvaluate(t *testing.T) {
	p := newPeer(t, "lenet5")
	before := len(p.db.Keys(""))
	h := newHandler(t)
	e := p.event
	e.Task, e.Rows = TaskEvaluate, rows(0, 150)
	r, err := h.Invoke(t.Context(), e)
	check(t, err)
	loss, correct, _ := p.reference(e.Rows)
	if math.Abs(r.Loss-loss) > 1e-5 || r.Correct != correct || r.Samples != 150 || r.Status != "" {
		t.Errorf("%+v, want loss %v, correct %d", r, loss, correct)
	}
	// Neither what an instance did before nor a larger workspace changes a bit of the loss.
	check(t, p.db.Accumulator(prefix+"gradient", len(p.params), 1, 1))
	_, err = h.Invoke(t.Context(), p.gradient(0, 128))
	check(t, err)
	p.db.Delete(prefix + "gradient")
	again, err := h.Invoke(t.Context(), e)
	check(t, err)
	if again.Loss != r.Loss || again.Correct != r.Correct {
		t.Errorf("evaluated again: %+v, want %+v", again, r)
	}
	if after := len(p.db.Keys("")); after != before {
		t.Errorf("%d keys, there were %d", after, before)
	}
}

// Parameters are read once for each version, and never another version than asked for.
func TestParameterVersions(t *testing.T) {
	p := newPeer(t, "logistic")
	h := newHandler(t)
	e := p.event
	e.Task, e.Rows = TaskEvaluate, rows(0, 10)
	first, err := h.Invoke(t.Context(), e)
	check(t, err)

	for i := range p.params {
		p.params[i] *= 2
	}
	version, err := p.db.Set(prefix+"parameters", tensor.FromFloats([]int{len(p.params)}, p.params))
	check(t, err)
	same, err := h.Invoke(t.Context(), e) // the old version is held
	check(t, err)
	if same.Loss != first.Loss {
		t.Errorf("loss %v, want %v", same.Loss, first.Loss)
	}
	_, err = newHandler(t).Invoke(t.Context(), e) // and gone for others
	wantError(t, err, Stale, "wanted")

	e.Parameters.Version = version
	second, err := h.Invoke(t.Context(), e)
	check(t, err)
	loss, _, _ := p.reference(e.Rows)
	if second.Loss == first.Loss || math.Abs(second.Loss-loss) > 1e-6 {
		t.Errorf("loss %v, want %v", second.Loss, loss)
	}
	e.Parameters.Version = version + 1
	_, err = h.Invoke(t.Context(), e)
	wantError(t, err, Stale, "are at version")
	e.Parameters.Version = 0 // whichever there is
	for range 2 {
		third, err := h.Invoke(t.Context(), e)
		check(t, err)
		if third.Loss != second.Loss {
			t.Errorf("loss %v, want %v", third.Loss, second.Loss)
		}
	}
	// Another model with the same handler.
	other := newPeer(t, "mlp")
	o := other.event
	o.Task, o.Rows = TaskEvaluate, rows(0, 10)
	r, err := h.Invoke(t.Context(), o)
	check(t, err)
	if loss, _, _ := other.reference(o.Rows); math.Abs(r.Loss-loss) > 1e-6 {
		t.Errorf("another model: loss %v, want %v", r.Loss, loss)
	}
}

func TestRefusals(t *testing.T) {
	p := newPeer(t, "logistic")
	n := len(p.params)
	check(t, p.db.Accumulator(prefix+"gradient", n, 4, 4))
	check(t, p.db.Accumulator(prefix+"short", n-1, 4, 4))
	set := func(key string, values []float32) {
		_, err := p.db.Set(prefix+key, tensor.FromFloats([]int{len(values)}, values))
		check(t, err)
	}
	poisoned := slices.Clone(p.params)
	poisoned[17] = float32(math.NaN())
	set("poisoned", poisoned)
	set("wrong length", p.params[:n-1])
	_, err := p.db.Set(prefix+"bad labels", tensor.Tensor{DType: tensor.Uint8, Shape: []int{samples}, Data: slices.Repeat([]byte{10}, samples)})
	check(t, err)
	_, err = p.db.Set("{job:1}:parameters", tensor.FromFloats([]int{n}, p.params))
	check(t, err)

	for name, c := range map[string]struct {
		change func(*Event)
		kind   string
		text   string
	}{
		"NaN":                {func(e *Event) { e.Parameters = Parameters{Key: prefix + "poisoned"}; e.Minibatch = 3 }, NotFinite, "minibatch 3"},
		"parameters' length": {func(e *Event) { e.Parameters = Parameters{Key: prefix + "wrong length"} }, BadEvent, "has 7850 float32 parameters"},
		"sum's length":       {func(e *Event) { e.Accumulate = prefix + "short" }, Refused, "31396"},
		"label":              {func(e *Event) { e.Labels = prefix + "bad labels" }, BadEvent, "is 10, but model"},
		"images as labels":   {func(e *Event) { e.Labels = e.Images }, BadEvent, "784 bytes a row, want 1"},
		"labels as images":   {func(e *Event) { e.Images = e.Labels }, BadEvent, "1 bytes a row, but model"},
		"no such key":        {func(e *Event) { e.Images = prefix + "none" }, Refused, "NOKEY"},
		"no such sum":        {func(e *Event) { e.Accumulate = prefix + "none" }, Refused, "NOKEY"},
		"another peer's key": {func(e *Event) { e.Parameters = Parameters{Key: "{job:1}:parameters"} }, Refused, "NOPERM"},
		"row out of range":   {func(e *Event) { e.Rows[1] = samples }, Refused, "OUTOFRANGE"},
		"minibatch":          {func(e *Event) { e.Minibatch = 4 }, Refused, "OUTOFRANGE"},
		"no database":        {func(e *Event) { e.Database.Address += "-none" }, DatabaseUnavailable, "connecting to the database"},
	} {
		h := newHandler(t)
		e := p.gradient(0, 8)
		c.change(&e)
		_, err := h.Invoke(t.Context(), e)
		wantError(t, err, c.kind, c.text)
		if c.kind != DatabaseUnavailable { // the instance is as good as before
			if _, err := h.Invoke(t.Context(), p.gradient(1, 8)); err != nil {
				t.Errorf("after %s: %v", name, err)
			}
		}
	}
	stranger := NewHandler(Config{Token: "guessed"})
	defer stranger.Close()
	_, err = stranger.Invoke(t.Context(), p.gradient(0, 8))
	wantError(t, err, Refused, "WRONGPASS")

	small := NewHandler(Config{Token: secret, MemoryMB: 1})
	defer small.Close()
	_, err = small.Invoke(t.Context(), p.gradient(0, 1000))
	wantError(t, err, BadEvent, "take a smaller minibatch or more memory")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = newHandler(t).Invoke(ctx, p.gradient(0, 8))
	wantError(t, err, DatabaseUnavailable, "canceled")

	// Nothing of all this is in the sum: only minibatch 1, buffered behind minibatch 0.
	check(t, p.db.Skip(prefix+"gradient", 0))
	check(t, p.db.Skip(prefix+"gradient", 2))
	check(t, p.db.Skip(prefix+"gradient", 3))
	counted, err := p.db.Average(prefix+"average", prefix+"gradient")
	check(t, err)
	_, _, want := p.reference(rows(1, 8))
	if got := p.floats(t, prefix+"average"); counted != 1 || !slices.Equal(got, want) {
		t.Errorf("%d counted", counted)
	}
}

// An event's own token is what counts: the instance has none, and what one event grants is not the next one's.
func TestGrantedEvents(t *testing.T) {
	p := newPeer(t, "logistic")
	check(t, p.db.Accumulator(prefix+"gradient", len(p.params), 3, 3))
	h := NewHandler(Config{})
	defer h.Close()
	granted := func(minibatch int) Event {
		e := p.gradient(minibatch, 8)
		var err error
		e.Database.Token, err = p.server.Sign(tensordb.Grant{
			Read: []string{e.Parameters.Key, e.Images, e.Labels}, Accumulate: e.Accumulate, Minibatch: minibatch, Life: time.Minute,
		})
		check(t, err)
		return e
	}
	for minibatch := range 2 {
		r, err := h.Invoke(t.Context(), granted(minibatch))
		check(t, err)
		if r.Status != "counted" {
			t.Errorf("minibatch %d: %s", minibatch, r.Status)
		}
	}
	other := granted(1)
	other.Minibatch = 2
	_, err := h.Invoke(t.Context(), other)
	wantError(t, err, Refused, "NOPERM")
	other = granted(2)
	other.Database.Token = other.Database.Token[:len(other.Database.Token)-2]
	_, err = h.Invoke(t.Context(), other)
	wantError(t, err, Refused, "WRONGPASS")
	other.Database.Token = strings.Repeat("x", maxToken+1)
	_, err = h.Invoke(t.Context(), other)
	wantError(t, err, BadEvent, "token")
	r, err := h.Invoke(t.Context(), granted(2)) // on the connection that was refused before
	check(t, err)
	if r.Status != "counted" {
		t.Errorf("minibatch 2: %s", r.Status)
	}
}

func TestReconnects(t *testing.T) {
	p := newPeer(t, "logistic")
	check(t, p.db.Accumulator(prefix+"gradient", len(p.params), 3, 3))
	h := newHandler(t)
	_, err := h.Invoke(t.Context(), p.gradient(0, 8))
	check(t, err)
	check(t, p.server.Close()) // with the handler's connection
	_, err = h.Invoke(t.Context(), p.gradient(1, 8))
	wantError(t, err, DatabaseUnavailable, "")
	p.serve(t)
	r, err := h.Invoke(t.Context(), p.gradient(1, 8))
	check(t, err)
	check(t, p.server.Close())
	p.serve(t) // the next command meets a broken connection, and a server
	r, err = h.Invoke(t.Context(), p.gradient(2, 8))
	check(t, err)
	if r.Status != "counted" {
		t.Errorf("status %q", r.Status)
	}
}

func wantError(t *testing.T, err error, kind, text string) {
	t.Helper()
	var typed *Error
	if !errors.As(err, &typed) || typed.Type != kind || !strings.Contains(typed.Message, text) {
		t.Errorf("error %v, want %s with %q", err, kind, text)
	}
}

func TestBadEvents(t *testing.T) {
	spec, err := nn.Builtin("logistic")
	check(t, err)
	good := Event{
		Task: TaskGradient, Database: Database{Network: "unix", Address: "/tmp/db"}, Model: spec, Parameters: Parameters{"p", 1},
		Images: "i", Labels: "l", Rows: []int{0}, Scale: 1, Accumulate: "a",
	}
	encode := func(e Event) string {
		b, err := json.Marshal(e)
		check(t, err)
		return string(b)
	}
	if _, err := decodeEvent([]byte(encode(good))); err != nil {
		t.Fatal(err)
	}
	hollow := good
	hollow.Model.Layers = nil
	for want, text := range map[string]string{
		"unexpected EOF":                encode(good)[:50],
		"unknown field":                 strings.Replace(encode(good), `"task"`, `"tusk"`, 1),
		"text after its end":            encode(good) + "{}",
		"cannot unmarshal string":       strings.Replace(encode(good), `"rows":[0]`, `"rows":["0"]`, 1), // garbage is not row 0
		"0 rows":                        strings.Replace(encode(good), `[0]`, `[]`, 1),
		"row 1 is -1":                   strings.Replace(encode(good), `[0]`, `[0,-1]`, 1),
		"4097 rows":                     strings.Replace(encode(good), `[0]`, "["+strings.Repeat("1,", MaxRows)+"1]", 1),
		"task \"learn\"":                strings.Replace(encode(good), `"gradient"`, `"learn"`, 1),
		"writes nothing":                strings.Replace(encode(good), `"gradient"`, `"evaluate"`, 1),
		"network \"udp\"":               strings.Replace(encode(good), `"unix"`, `"udp"`, 1),
		"scale 0":                       strings.Replace(encode(good), `"scale":1`, `"scale":0`, 1),
		"images has 0 bytes":            strings.Replace(encode(good), `"images":"i"`, `"images":""`, 1),
		"labels has 600 bytes":          strings.Replace(encode(good), `"labels":"l"`, `"labels":"`+strings.Repeat("l", 600)+`"`, 1),
		"accumulate has 0 bytes":        strings.Replace(encode(good), `"accumulate":"a"`, `"accumulate":""`, 1),
		"minibatch is -1":               strings.Replace(encode(good), `"accumulate"`, `"minibatch":-1,"accumulate"`, 1),
		"model \"logistic\": no layers": encode(hollow),
	} {
		_, err := decodeEvent([]byte(text))
		wantError(t, err, BadEvent, want)
	}
}

func FuzzDecodeEvent(f *testing.F) {
	spec, err := nn.Builtin("lenet5")
	check(f, err)
	b, err := json.Marshal(Event{
		Task: TaskGradient, Database: Database{Network: "unix", Address: "/tmp/db"}, Model: spec, Parameters: Parameters{"p", 1},
		Images: "i", Labels: "l", Rows: []int{0, 5}, Scale: 1, Accumulate: "a", Minibatch: 3,
	})
	check(f, err)
	f.Add(b)
	f.Add([]byte(`{"task":"evaluate","rows":[1e3]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEvent(b)
		var typed *Error
		if err != nil && (!errors.As(err, &typed) || typed.Type != BadEvent) {
			t.Errorf("error %v", err)
		}
		if err == nil && (len(e.Rows) == 0 || e.Images == "" || len(e.Model.Layers) == 0) {
			t.Errorf("%+v passed", e)
		}
	})
}
