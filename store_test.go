package spirt

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

const testPrefix = "{job:1}:"

// alike are the shares of members that do the same.
var alike = equalShares(8, 1)

func testStore(t testing.TB, c optim.Config, params int) *store {
	t.Helper()
	db, err := tensordb.Open(tensordb.Config{})
	check(t, err)
	t.Cleanup(func() { db.Close() })
	job := DefaultJob()
	s := newStore(db, testPrefix, &job, params)
	s.optim, s.state = func(uint64) optim.Config { return c }, c.StateLen(params)
	return s
}

var (
	adam     = optim.Config{Name: optim.Adam, LR: 0.01, Beta1: 0.9, Beta2: 0.999, Eps: 1e-8}
	momentum = optim.Config{Name: optim.SGD, LR: 0.01, Momentum: 0.9}
	plainSGD = optim.Config{Name: optim.SGD, LR: 0.01}
)

// random returns a vector that depends on the seed only.
func random(seed uint64, n int) []float32 {
	r := rand.New(rand.NewPCG(seed, 1))
	v := make([]float32, n)
	for i := range v {
		v[i] = float32(r.NormFloat64())
	}
	return v
}

// put keeps an average as if it had been fetched, and returns its hash.
func put(t testing.TB, s *store, average []float32) treehash.Hash {
	t.Helper()
	draft, err := s.db.Draft(tensor.Float32, len(average))
	check(t, err)
	copy(draft.Data(), tensor.Bytes(average))
	h := treehash.Sum(draft.Data())
	check(t, s.putAverage(h, draft))
	return h
}

// genesisOf keeps these parameters with a state of zeros as what a run starts
// from.
func genesisOf(t testing.TB, s *store, params []float32) round.Record {
	t.Helper()
	model, state, err := s.putState(tensor.Bytes(params), make([]byte, 4*s.state), 0)
	check(t, err)
	return round.Genesis(treehash.Hash{1}, treehash.Hash{2}, model, state)
}

// floatsOf copies what the store serves by this hash.
func floatsOf(t testing.TB, s *store, h treehash.Hash) []float32 {
	t.Helper()
	data, release, ok := s.Body(h)
	if !ok {
		t.Fatalf("no body of the hash %s", h)
	}
	defer release()
	if treehash.Sum(data) != h {
		t.Fatalf("the body of %s has the hash %s", h, treehash.Sum(data))
	}
	return slices.Clone(tensor.Floats(data))
}

func holds(s *store, h treehash.Hash) bool {
	_, release, ok := s.Body(h)
	if ok {
		release()
	}
	return ok
}

func TestCheckAverage(t *testing.T) {
	inf := float32(math.Inf(1))
	// Around the four that are looked at together.
	for _, n := range []int{1, 3, 4, 5, 8, 1023} {
		s := testStore(t, adam, n)
		for _, v := range []float32{0, -1, maxCoordinate, -maxCoordinate, 1e-45} {
			for i := range n {
				f := make([]float32, n)
				f[i] = v
				check(t, s.checkAverage(tensor.Bytes(f)))
				f[i] = inf
				refused(t, s.checkAverage(tensor.Bytes(f)), fmt.Sprintf("coordinate %d is not finite: +Inf", i))
				f[i] = -float32(math.NaN())
				refused(t, s.checkAverage(tensor.Bytes(f)), fmt.Sprintf("coordinate %d is not finite: NaN", i))
				f[i] = math.Nextafter32(maxCoordinate, inf)
				refused(t, s.checkAverage(tensor.Bytes(f)), fmt.Sprintf("coordinate %d is out of bounds", i), "1e+15")
				f[i] = -math.MaxFloat32
				refused(t, s.checkAverage(tensor.Bytes(f)), fmt.Sprintf("coordinate %d is out of bounds", i), "-3.4028235e+38")
			}
		}
		// The first is named.
		f := make([]float32, n)
		f[n-1], f[n/2] = inf, 2*maxCoordinate
		refused(t, s.checkAverage(tensor.Bytes(f)), fmt.Sprintf("coordinate %d ", n/2))
		for _, bytes := range []int{0, 4*n - 1, 4*n + 1, 4*n + 4, 4*n - 4} {
			refused(t, s.checkAverage(make([]byte, bytes)), fmt.Sprintf("%d bytes", bytes), fmt.Sprintf("%d of %d parameters", 4*n, n))
		}
	}
}

// An average of this peer's own is checked as those of the others are, and
// one that is refused leaves nothing behind.
func TestFinishAverageRefuses(t *testing.T) {
	s := testStore(t, adam, 5)
	acc := s.key("gradient/1")
	check(t, s.db.Accumulator(acc, 5, 2, 2))
	_, err := s.db.Accumulate(acc, 0, []float32{1, 2, 3, 4, 5})
	check(t, err)
	_, err = s.db.Accumulate(acc, 1, []float32{0, 0, 0, 3e15, 0})
	check(t, err)
	_, _, err = s.finishAverage(acc)
	refused(t, err, "average of 2 minibatches", "coordinate 3 is out of bounds")
	if stats := s.db.(*tensordb.DB).Stats(); stats.Keys != 0 || stats.Accumulators != 0 || len(s.bodies) != 0 || len(s.pinned) != 0 {
		t.Errorf("%+v, %d bodies, %d pinned", stats, len(s.bodies), len(s.pinned))
	}
	_, _, err = s.finishAverage(acc)
	refused(t, err, acc)

	check(t, s.db.Accumulator(acc, 5, 2, 2)) // a minibatch is missing
	_, err = s.db.Accumulate(acc, 0, []float32{1, 2, 3, 4, 5})
	check(t, err)
	_, _, err = s.finishAverage(acc)
	refused(t, err, "minibatch")
	if stats := s.db.(*tensordb.DB).Stats(); stats.Keys != 0 || stats.Accumulators != 0 {
		t.Errorf("%+v", stats)
	}
}

// With codec float16 the average that travels, and that this peer trains on
// too, is the rounded one.
func TestHalfAverages(t *testing.T) {
	const n = 1003
	s := testStore(t, plainSGD, n)
	s.half = true
	params := random(1, n)
	parent := genesisOf(t, s, params)
	members := shares{{member: 0, minibatches: 2}, {member: 1, minibatches: 5}}
	var set []round.Entry
	grad := make([]float32, n)
	for peer := range 2 {
		g := random(uint64(2+peer), n)
		acc := s.key("gradient/1")
		check(t, s.db.Accumulator(acc, n, 1, 1))
		_, err := s.db.Accumulate(acc, 0, g)
		check(t, err)
		h, _, err := s.finishAverage(acc)
		check(t, err)
		defer s.unpin(h)
		if s.db.(*tensordb.DB).Stats().Accumulators != 0 || len(s.db.Keys(s.key("gradient/"))) != 0 {
			t.Error("something stays behind")
		}
		data, release, ok := s.Body(h)
		if _, size := s.codec(); !ok || len(data) != 2*n || size != 2*n || treehash.Sum(data) != h {
			t.Fatalf("the body of the average has %d bytes", len(data))
		}
		check(t, s.checkAverage(data))
		rounded := make([]uint16, n)
		for i, b := range data {
			rounded[i/2] |= uint16(b) << (i % 2 * 8)
		}
		release()
		for i, v := range g {
			x := halfValue(rounded[i])
			if d := math.Abs(float64(v - x)); d > math.Abs(float64(v))/2048+3e-8 {
				t.Fatalf("%v travels as %v", v, x)
			}
			grad[i] += float32([]float32{2, 5}[peer] * x)
		}
		set = append(set, round.Entry{Peer: round.Peer(peer), Gradient: h})
	}
	for i := range grad {
		grad[i] /= 7
	}
	plainSGD.Step(params, nil, params, nil, grad, 1)
	model, _, err := s.apply(parent, set, members)
	check(t, err)
	if model != treehash.Sum(tensor.Bytes(params)) {
		t.Error("another model than by hand")
	}

	// What others send is checked as it came.
	for i := range n {
		b := make([]byte, 2*n)
		b[2*i], b[2*i+1] = 0xff, 0x7b
		check(t, s.checkAverage(b))
		b[2*i], b[2*i+1] = 0, 0xfc
		refused(t, s.checkAverage(b), fmt.Sprintf("coordinate %d is not finite", i))
	}
	refused(t, s.checkAverage(make([]byte, 4*n)), "not the 2006 of 1003 parameters")

	// What no half can hold is no average.
	acc, big := s.key("gradient/2"), make([]float32, n)
	big[7] = -70000
	check(t, s.db.Accumulator(acc, n, 1, 1))
	_, err = s.db.Accumulate(acc, 0, big)
	check(t, err)
	_, _, err = s.finishAverage(acc)
	refused(t, err, "average of 1 minibatches", "-70000 at index 7", "65504", "codec float32", "smaller learning rate")
	if s.db.(*tensordb.DB).Stats().Accumulators != 0 || len(s.db.Keys(s.key("gradient/"))) != 0 {
		t.Error("a refused average stays behind")
	}
}

// halfValue is what a finite half stands for.
func halfValue(h uint16) float32 {
	v := math.Ldexp(float64(h&0x3ff), -24)
	if e := int(h >> 10 & 31); e > 0 {
		v = math.Ldexp(float64(1024+int(h&0x3ff)), e-25)
	}
	if h>>15 == 1 {
		v = -v
	}
	return float32(v)
}

func TestFinishAverage(t *testing.T) {
	s := testStore(t, adam, 4)
	acc := s.key("gradient/1")
	check(t, s.db.Accumulator(acc, 4, 3, 3))
	for _, i := range []int{2, 0} {
		_, err := s.db.Accumulate(acc, i, []float32{float32(i), 1, 2, 3})
		check(t, err)
	}
	check(t, s.db.Skip(acc, 1))
	h, counted, err := s.finishAverage(acc)
	check(t, err)
	if got := floatsOf(t, s, h); counted != 2 || !slices.Equal(got, []float32{1, 1, 2, 3}) {
		t.Errorf("the average of %d minibatches is %v", counted, got)
	}
	// It stays, whatever the loop says that does not know it yet. Two computed
	// averages may be the same.
	check(t, s.db.Accumulator(acc, 4, 1, 1))
	_, err = s.db.Accumulate(acc, 0, []float32{1, 1, 2, 3})
	check(t, err)
	again, _, err := s.finishAverage(acc)
	check(t, err)
	if again != h {
		t.Errorf("the same average has the hashes %s and %s", h, again)
	}
	for left := 2; left >= 0; left-- {
		s.retain(nil, nil)
		if holds(s, h) != (left > 0) {
			t.Errorf("pinned %d times: held %v", left, holds(s, h))
		}
		if left > 0 {
			s.unpin(h)
		}
	}
	if len(s.pinned) != 0 || s.db.(*tensordb.DB).Stats().Keys != 0 {
		t.Errorf("%d pinned, %+v", len(s.pinned), s.db.(*tensordb.DB).Stats())
	}
}

// apply is the mean, in the set's order, and the optimizer's step, and gives
// the same bits in whatever order the averages came.
func TestApplyByHand(t *testing.T) {
	const n, peers, steps = 1003, 4, 3
	for name, c := range map[string]optim.Config{"adam": adam, "momentum": momentum, "plain": plainSGD} {
		t.Run(name, func(t *testing.T) {
			var ends []round.Record
			for order := range 3 {
				s := testStore(t, c, n)
				params, state := random(1, n), make([]float32, c.StateLen(n))
				parent := genesisOf(t, s, params)
				for step := uint64(1); step <= steps; step++ {
					set := make([]round.Entry, peers)
					arrival := rand.New(rand.NewPCG(step, uint64(order))).Perm(peers)
					grad := make([]float32, n)
					for _, p := range arrival {
						set[p] = round.Entry{Peer: round.Peer(p), Gradient: put(t, s, random(step*100+uint64(p), n))}
					}
					for p := range peers {
						for i, v := range random(step*100+uint64(p), n) {
							grad[i] += v
						}
					}
					for i := range grad {
						grad[i] /= peers
					}
					c.Step(params, state, params, state, grad, step)

					model, optimizer, err := s.apply(parent, set, alike)
					check(t, err)
					again, optimizerAgain, err := s.apply(parent, set, alike)
					check(t, err)
					if model != again || optimizer != optimizerAgain {
						t.Fatal("applied again, the set gives another state")
					}
					if model != treehash.Sum(tensor.Bytes(params)) || optimizer != treehash.Sum(tensor.Bytes(state)) {
						t.Fatalf("step %d: model %s, by hand %s", step, model.Short(), treehash.Sum(tensor.Bytes(params)).Short())
					}
					if !slices.Equal(floatsOf(t, s, model), params) || !slices.Equal(floatsOf(t, s, optimizer), state) {
						t.Fatal("the state is not served by its hashes")
					}
					parent = round.Record{Height: step, Parent: parent.ID(), Set: set, Model: model, State: optimizer}
					if !s.hasState(parent) {
						t.Fatal("the new state is not there")
					}
					s.retain([]round.Record{parent}, nil)
					if keys := s.db.Keys(s.key("average/")); len(keys) != 0 {
						t.Fatalf("left: %v", keys)
					}
				}
				ends = append(ends, parent)
			}
			if ends[0].Model != ends[1].Model || ends[0].Model != ends[2].Model {
				t.Error("the model depends on the order of arrival")
			}
		})
	}
}

// An average counts as much as its member's share says; where all are alike,
// the bits are those of the plain mean.
func TestApplyWeights(t *testing.T) {
	const n = 1003
	s := testStore(t, plainSGD, n)
	params := random(1, n)
	parent := genesisOf(t, s, params)
	set := []round.Entry{{Peer: 0}, {Peer: 3}, {Peer: 4}}
	members := shares{{member: 0, minibatches: 3}, {member: 2, minibatches: 9}, {member: 3, minibatches: 1}, {member: 4, minibatches: 7, private: true}}
	grad := make([]float32, n)
	for i := range set {
		g := random(uint64(2+i), n)
		set[i].Gradient = put(t, s, g)
		for j, v := range g {
			grad[j] += float32([]float32{3, 1, 7}[i] * v)
		}
	}
	for j := range grad {
		grad[j] /= 11
	}
	plainSGD.Step(params, nil, params, nil, grad, 1)
	model, _, err := s.apply(parent, set, members)
	check(t, err)
	if model != treehash.Sum(tensor.Bytes(params)) {
		t.Error("another model than by hand")
	}
	var models []treehash.Hash
	for _, minibatches := range []int{1, 3} {
		model, _, err := s.apply(parent, set, equalShares(5, minibatches))
		check(t, err)
		models = append(models, model)
	}
	if models[0] != models[1] || models[0] == model {
		t.Errorf("equal shares give %s and %s, others %s", models[0].Short(), models[1].Short(), model.Short())
	}
	_, _, err = s.apply(parent, set, members[:3])
	refused(t, err, "aggregating 3 averages", "peer 5 is not on the roster")
}

// The set's order counts, not that of anything else: float sums depend on it.
func TestApplyRefuses(t *testing.T) {
	s := testStore(t, adam, 8)
	genesis := genesisOf(t, s, random(1, 8))
	h := put(t, s, random(2, 8))
	_, _, err := s.apply(genesis, []round.Entry{{Peer: 0, Gradient: h}, {Peer: 1, Gradient: treehash.Hash{9}}}, alike)
	refused(t, err, "aggregating 2 averages", treehash.Hash{9}.String())
	_, _, err = s.apply(genesis, nil, alike)
	refused(t, err, "aggregating 0 averages")
	_, _, err = s.apply(round.Record{}, []round.Entry{{Peer: 0, Gradient: h}}, alike)
	refused(t, err, "the parent's parameters")
	lost := genesis
	lost.State = treehash.Hash{1}
	_, _, err = s.apply(lost, []round.Entry{{Peer: 0, Gradient: h}}, alike)
	refused(t, err, "the parent's optimizer state")
	wrong := genesis
	wrong.Height = 5 // there is no state of that height
	_, _, err = s.apply(wrong, []round.Entry{{Peer: 0, Gradient: h}}, alike)
	refused(t, err, "the parent's parameters")
	for _, key := range s.db.Keys(testPrefix) {
		if key == s.key("aggregate") {
			t.Error("the aggregate stays behind")
		}
	}
	if _, _, err := s.apply(genesis, []round.Entry{{Peer: 0, Gradient: h}}, alike); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestPutState(t *testing.T) {
	s := testStore(t, adam, 8)
	for _, c := range [][2]int{{31, 64}, {32, 60}, {32, 0}, {0, 64}, {36, 72}, {64, 32}} {
		_, _, err := s.putState(make([]byte, c[0]), make([]byte, c[1]), 1)
		refused(t, err, fmt.Sprintf("%d and %d bytes, not 32 and 64", c[0], c[1]))
	}
	if n := s.db.(*tensordb.DB).Stats().Keys; n != 0 {
		t.Errorf("%d keys after states that were refused", n)
	}
	// A state from outside goes on from its height.
	params, state := random(1, 8), random(2, 16)
	for i := range state {
		state[i] = float32(math.Abs(float64(state[i])))
	}
	model, opt, err := s.putState(tensor.Bytes(params), tensor.Bytes(state), 41)
	check(t, err)
	grad := random(3, 8)
	h := put(t, s, grad)
	got, _, err := s.apply(round.Record{Height: 41, Model: model, State: opt}, []round.Entry{{Gradient: h}}, alike)
	check(t, err)
	adam.Step(params, state, params, state, grad, 42)
	if got != treehash.Sum(tensor.Bytes(params)) {
		t.Error("the step after a state from outside is another than by hand")
	}
	// Its bytes were copied.
	clear(params)
	floatsOf(t, s, model)
}

// A body stays as it is for who reads it, though it is dropped meanwhile.
func TestBodyOutlivesRetain(t *testing.T) {
	s := testStore(t, momentum, 1000)
	want := random(1, 1000)
	h := put(t, s, want)
	data, release, ok := s.Body(h)
	if !ok {
		t.Fatal("no body")
	}
	s.retain(nil, nil)
	if holds(s, h) {
		t.Error("it was not dropped")
	}
	for i := range 50 { // what is free is used again
		put(t, s, random(uint64(i+2), 1000))
		s.retain(nil, nil)
	}
	if !bytes.Equal(data, tensor.Bytes(want)) {
		t.Error("the bytes changed in the hands of the reader")
	}
	release()
	if _, _, ok := s.Body(treehash.Hash{}); ok {
		t.Error("there is a body of no hash")
	}
}

func TestRetain(t *testing.T) {
	s := testStore(t, momentum, 16)
	genesis := genesisOf(t, s, random(1, 16))
	kept, dropped := put(t, s, random(2, 16)), put(t, s, random(3, 16))
	model, state, err := s.apply(genesis, []round.Entry{{Gradient: kept}}, alike)
	check(t, err)
	first := round.Record{Height: 1, Model: model, State: state}
	model, state, err = s.apply(genesis, []round.Entry{{Gradient: dropped}}, alike)
	check(t, err)
	other := round.Record{Height: 1, Model: model, State: state}

	check(t, s.db.Copy(s.key("checkpoint/parameters"), s.parametersKey(1, first.Model))) // none of its business
	s.retain([]round.Record{first}, []treehash.Hash{kept})
	for what, c := range map[string]struct{ got, want bool }{
		"the kept average":    {holds(s, kept), true},
		"the other average":   {holds(s, dropped), false},
		"the kept state":      {s.hasState(first), true},
		"the other state":     {s.hasState(other), false},
		"genesis":             {s.hasState(genesis), false},
		"genesis as a body":   {holds(s, genesis.Model), false},
		"another's key":       {s.db.Exists(s.key("checkpoint/parameters")), true},
		"half of a state":     {s.db.Exists(s.optimizerKey(1, other.State)), false},
		"the kept parameters": {holds(s, first.Model), true},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v", what, c.got)
		}
	}
}

// Bytes can be an average and a state at once, as the first step of momentum
// makes them: each is dropped for itself, and served while one is there.
func TestOneBodyTwice(t *testing.T) {
	for _, first := range []string{"average", "state"} {
		s := testStore(t, momentum, 16)
		genesis := genesisOf(t, s, random(1, 16))
		h := put(t, s, random(2, 16))
		model, state, err := s.apply(genesis, []round.Entry{{Gradient: h}}, alike)
		check(t, err)
		if state != h {
			t.Fatal("the buffer of momentum after one step is not the average")
		}
		head := round.Record{Height: 1, Model: model, State: state}
		switch first {
		case "average":
			s.retain([]round.Record{head}, nil)
			if s.hasAverage(h) {
				t.Error("bytes that are kept as a state count as an average")
			}
			if _, _, err := s.apply(genesis, []round.Entry{{Gradient: h}}, alike); err == nil {
				t.Error("an average that is gone was applied")
			}
		case "state":
			s.retain(nil, []treehash.Hash{h})
			if s.hasState(head) {
				t.Error("bytes that are kept as an average count as a state")
			}
		}
		floatsOf(t, s, h)
	}
}

// A state that somebody fetches stays for a lease, but only so many do.
func TestRetainLease(t *testing.T) {
	s := testStore(t, momentum, 16)
	parent := genesisOf(t, s, random(1, 16))
	var records []round.Record
	for i := range uint64(2 * maxLeased) {
		model, state, err := s.apply(parent, []round.Entry{{Gradient: put(t, s, random(i+2, 16))}}, alike)
		check(t, err)
		parent = round.Record{Height: i + 1, Model: model, State: state}
		records = append(records, parent)
	}
	floatsOf(t, s, records[0].Model)
	s.retain(records[1:], nil)
	if !s.hasState(records[0]) {
		t.Error("a state is dropped while it is fetched")
	}
	for _, r := range records {
		floatsOf(t, s, r.Model)
	}
	floatsOf(t, s, records[0].State) // this fetch goes on
	s.retain(nil, nil)
	for i, r := range records {
		if want := i == 0 || i > len(records)-maxLeased; s.hasState(r) != want {
			t.Errorf("the state of height %d is kept: %v, want %v", r.Height, !want, want)
		}
	}
	s.mu.Lock()
	for key := range s.served { // the lease ends
		s.served[key] = time.Now().Add(-lease - time.Second)
	}
	s.mu.Unlock()
	s.retain(nil, nil)
	if n := s.db.(*tensordb.DB).Stats().Keys; n != 0 || len(s.served) != 0 || len(s.bodies) != 0 {
		t.Errorf("%d keys, %d leases, %d bodies", n, len(s.served), len(s.bodies))
	}
}

// A long run takes no more memory than a short one.
func TestStoreBounded(t *testing.T) {
	const n, peers = 64, 4
	s := testStore(t, adam, n)
	head := genesisOf(t, s, random(1, n))
	var early tensordb.Stats
	for slot := range uint64(1000) {
		set, averages := make([]round.Entry, peers), make([]treehash.Hash, peers)
		for p := range peers {
			averages[p] = put(t, s, random(slot*peers+uint64(p), n))
			set[p] = round.Entry{Peer: round.Peer(p), Gradient: averages[p]}
		}
		acc := s.key(fmt.Sprintf("gradient/%d", slot))
		check(t, s.db.Accumulator(acc, n, 1, 1))
		_, err := s.db.Accumulate(acc, 0, random(slot+1<<40, n))
		check(t, err)
		h, _, err := s.finishAverage(acc)
		check(t, err)
		model, state, err := s.apply(head, set, alike)
		check(t, err)
		next := round.Record{Height: head.Height + 1, Model: model, State: state}
		floatsOf(t, s, model)
		s.retain([]round.Record{head, next}, averages)
		s.unpin(h)
		head = next
		if slot == 50 {
			early = s.db.(*tensordb.DB).Stats()
		}
	}
	late := s.db.(*tensordb.DB).Stats()
	// States that were asked for stay for a lease.
	if most := 4 + peers + 1 + 2*maxLeased; late.Keys > most || len(s.bodies) > most || len(s.pinned) != 0 || late.Accumulators != 0 {
		t.Errorf("%d keys, %d bodies, at most %d were expected; %d pinned; %d accumulators", late.Keys, len(s.bodies), most, len(s.pinned), late.Accumulators)
	}
	if late.MemoryUsed > 2*early.MemoryUsed || late.MemoryFree > 4*early.MemoryUsed+1<<20 {
		t.Errorf("after 50 slots %+v, after 1,000 %+v", early, late)
	}
	if len(s.served) > 1000 {
		t.Errorf("%d leases", len(s.served))
	}
}

// Readers of bodies, retain and what makes new ones do not disturb each other:
// for the race detector.
func TestStoreConcurrent(t *testing.T) {
	const n = 256
	s := testStore(t, momentum, n)
	genesis := genesisOf(t, s, random(1, n))
	hashes := make(chan treehash.Hash, 1000)
	stop := make(chan struct{})
	read := make(chan error, 2)
	for range 2 {
		go func() {
			for h := range hashes {
				if data, release, ok := s.Body(h); ok {
					if treehash.Sum(data) != h {
						read <- fmt.Errorf("the body of %s changed", h)
						return
					}
					release()
				}
			}
			read <- nil
		}()
	}
	retained := make(chan struct{})
	go func() {
		defer close(retained)
		for {
			select {
			case <-stop:
				return
			default:
				s.retain([]round.Record{genesis}, nil)
			}
		}
	}()
	for i := range uint64(200) {
		acc := s.key(fmt.Sprintf("gradient/%d", i))
		check(t, s.db.Accumulator(acc, n, 1, 1))
		_, err := s.db.Accumulate(acc, 0, random(i, n))
		check(t, err)
		h, _, err := s.finishAverage(acc) // pinned: it is there until unpin
		check(t, err)
		hashes <- h
		model, _, err := s.apply(genesis, []round.Entry{{Gradient: h}}, alike)
		if err != nil && !strings.Contains(err.Error(), "no such key") {
			t.Fatal(err)
		}
		hashes <- model
		if !holds(s, h) {
			t.Fatalf("the pinned average of minibatch %d is gone", i)
		}
		s.unpin(h)
	}
	close(stop)
	close(hashes)
	<-retained
	for range 2 {
		check(t, <-read)
	}
}
