package spirt

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// store is a peer's view of its own tensor database: the state (parameters
// and optimizer state) that follows each record it keeps, and the averages of
// the present slots. All of these are bodies that it serves by hash. Its
// methods may be called from several goroutines.
type store struct {
	db     database
	prefix string // of every key: {job:peer}:
	params int    // number of parameters
	state  int    // floats of optimizer state
	half   bool   // averages are float16
	optim  func(round uint64) optim.Config

	mu     sync.Mutex
	bodies map[treehash.Hash][]string // keys of the bytes that have this hash: an average may be a state as well
	pinned map[treehash.Hash]int      // averages that the loop has not heard of
	served map[string]time.Time       // when a part of a state was last asked for, by what the keys of a state begin with

	applying sync.Mutex // there is one candidate at a time
}

func newStore(db database, prefix string, job *Job, params int) *store {
	return &store{db: db, prefix: prefix, params: params, half: job.Codec == codecFloat16,
		state: job.optimizerAt(1).StateLen(params), optim: job.optimizerAt, bodies: map[treehash.Hash][]string{}, pinned: map[treehash.Hash]int{},
		served: map[string]time.Time{}}
}

func (s *store) key(name string) string { return s.prefix + name }

// A state is named by what it is and by how many steps led to it, not by its
// record: a state exists before a record of it is signed.

func (s *store) parametersKey(height uint64, model treehash.Hash) string {
	return s.stateKey(height) + "parameters/" + model.String()
}

func (s *store) optimizerKey(height uint64, state treehash.Hash) string {
	return s.stateKey(height) + "optimizer/" + state.String()
}

// stateKey is what the keys of the states after so many steps begin with.
func (s *store) stateKey(height uint64) string {
	return s.key("state/" + strconv.FormatUint(height, 10) + "/")
}

// stateOf returns the stateKey that a key begins with, "" if it is of no state.
func (s *store) stateOf(key string) string {
	states := s.key("state/")
	if rest, ok := strings.CutPrefix(key, states); ok {
		return key[:len(states)+strings.IndexByte(rest, '/')+1]
	}
	return ""
}

func (s *store) stateKeys(r round.Record) (parameters, optimizer string) {
	return s.parametersKey(r.Height, r.Model), s.optimizerKey(r.Height, r.State)
}

func (s *store) averageKey(h treehash.Hash) string { return s.key("average/" + h.String()) }

// Body returns the bytes that have the hash h, until release is called. It
// implements p2p.Bodies.
func (s *store) Body(h treehash.Hash) (data []byte, release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.bodies[h] {
		ref, err := s.db.Get(key)
		if err != nil {
			continue // dropped meanwhile
		}
		if state := s.stateOf(key); state != "" {
			s.served[state] = time.Now()
		}
		if ok {
			ref.Release()
			continue
		}
		data, release, ok = ref.Tensor().Data, ref.Release, true
	}
	return data, release, ok
}

// hasAverage reports whether an average is here that was checked as one: other
// bytes with its hash do not count.
func (s *store) hasAverage(h treehash.Hash) bool { return s.db.Exists(s.averageKey(h)) }

func (s *store) offer(h treehash.Hash, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offerLocked(h, key)
}

func (s *store) offerLocked(h treehash.Hash, key string) {
	if !slices.Contains(s.bodies[h], key) {
		s.bodies[h] = append(s.bodies[h], key)
	}
}

// draft returns room for an average as it travels.
func (s *store) draft() (*tensordb.Draft, error) {
	if s.half {
		return s.db.Draft(tensor.Float16, s.params)
	}
	return s.db.Draft(tensor.Float32, s.params)
}

// codec returns how averages travel, and how many bytes they have then.
func (s *store) codec() (codec uint8, bytes int) {
	if s.half {
		return round.CodecFloat16, 2 * s.params
	}
	return round.CodecFloat32, 4 * s.params
}

// maxCoordinate bounds each coordinate of an average: sums over a roster and
// squares of what is smaller stay finite in float32.
const maxCoordinate = 1e15

// checkAverage reports why data is not an average to train on.
func (s *store) checkAverage(data []byte) error {
	if _, want := s.codec(); len(data) != want {
		return fmt.Errorf("it has %d bytes, not the %d of %d parameters", len(data), want, s.params)
	}
	if s.half { // all that is finite is within bounds
		if i := tensor.NonFiniteHalf(tensor.Halves(data)); i >= 0 {
			return fmt.Errorf("coordinate %d is not finite", i)
		}
		return nil
	}
	floats := tensor.Floats(data)
	switch i := kernel.FirstBeyond(floats, maxCoordinate); {
	case i < 0:
		return nil
	case floats[i]-floats[i] != 0: // NaN or infinite
		return fmt.Errorf("coordinate %d is not finite: %v", i, floats[i])
	default:
		return fmt.Errorf("coordinate %d is out of bounds: %v is beyond %v", i, floats[i], float32(maxCoordinate))
	}
}

// putAverage keeps a peer's average, whose hash was checked on arrival.
func (s *store) putAverage(h treehash.Hash, draft *tensordb.Draft) error {
	if _, err := draft.Commit(s.averageKey(h)); err != nil {
		return err
	}
	s.offer(h, s.averageKey(h))
	return nil
}

// finishAverage turns an accumulator into this peer's average as it travels,
// and returns its hash and how many minibatches it contains. It is kept until
// unpin.
func (s *store) finishAverage(acc string) (h treehash.Hash, counted int, err error) {
	defer s.db.Delete(acc)
	dst := acc + "/average"
	if counted, err = s.db.Average(dst, acc); err != nil {
		return h, 0, err
	}
	if s.half {
		if err := s.db.Half(dst, dst); err != nil {
			s.db.Delete(dst)
			return h, 0, fmt.Errorf("the average of %d minibatches: %w: take codec float32, or a smaller learning rate", counted, err)
		}
	}
	ref, err := s.db.Get(dst)
	if err != nil {
		return h, 0, err
	}
	h, err = ref.Hash(), s.checkAverage(ref.Tensor().Data)
	ref.Release()
	if err != nil {
		s.db.Delete(dst)
		return h, 0, fmt.Errorf("the average of %d minibatches: %w", counted, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.db.Rename(s.averageKey(h), dst); err != nil {
		return h, 0, err
	}
	s.offerLocked(h, s.averageKey(h))
	s.pinned[h]++
	return h, counted, nil
}

// unpin lets retain drop an average of finishAverage.
func (s *store) unpin(h treehash.Hash) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pinned[h]--; s.pinned[h] == 0 {
		delete(s.pinned, h)
	}
}

// apply aggregates the averages of a set, in its order and by the shares of
// their members, updates the parent's state with the aggregate and keeps what
// follows.
func (s *store) apply(parent round.Record, set []round.Entry, members shares) (model, optimizer treehash.Hash, err error) {
	s.applying.Lock()
	defer s.applying.Unlock()
	keys := make([]string, len(set))
	for i, e := range set {
		keys[i] = s.averageKey(e.Gradient)
	}
	aggregate, params, opt := s.key("aggregate"), s.key("candidate/parameters"), s.key("candidate/optimizer")
	weights, err := members.weights(set)
	if err != nil {
		return model, optimizer, fmt.Errorf("aggregating %d averages: %w", len(set), err)
	}
	if err := s.db.Mean(aggregate, keys, weights); err != nil {
		return model, optimizer, fmt.Errorf("aggregating %d averages: %w", len(set), err)
	}
	defer s.db.Delete(aggregate)
	k := tensordb.UpdateKeys{Gradient: aggregate, IntoParams: params, IntoState: opt}
	k.Params, k.State = s.stateKeys(parent)
	for i, key := range []string{k.Params, k.State} {
		if !s.db.Exists(key) {
			return model, optimizer, fmt.Errorf("the parent's %s: %w: %q", [...]string{"parameters", "optimizer state"}[i], tensordb.ErrNoKey, key)
		}
	}
	height := parent.Height + 1
	s.db.Delete(params, opt) // of an attempt that was given up
	if _, err := s.db.Update(k, height, s.optim(height)); err != nil {
		return model, optimizer, fmt.Errorf("updating the parameters: %w", err)
	}
	return s.keepState(height, params, opt)
}

// keepState moves a state to where it belongs by its hashes, which it
// returns.
func (s *store) keepState(height uint64, params, opt string) (model, optimizer treehash.Hash, err error) {
	if model, err = s.db.Hash(params); err != nil {
		return model, optimizer, err
	}
	if optimizer, err = s.db.Hash(opt); err != nil {
		return model, optimizer, err
	}
	for _, m := range []struct {
		dst, src string
		hash     treehash.Hash
	}{{s.parametersKey(height, model), params, model}, {s.optimizerKey(height, optimizer), opt, optimizer}} {
		if err := s.db.Rename(m.dst, m.src); err != nil {
			return model, optimizer, err
		}
		s.offer(m.hash, m.dst)
	}
	return model, optimizer, nil
}

// putState keeps a state that came from outside, of so many steps, and
// returns its hashes.
func (s *store) putState(params, optimizer []byte, height uint64) (model, state treehash.Hash, err error) {
	s.applying.Lock()
	defer s.applying.Unlock()
	if len(params) != 4*s.params || len(optimizer) != 4*s.state {
		return model, state, fmt.Errorf("a state has %d and %d bytes, not %d and %d",
			len(params), len(optimizer), 4*s.params, 4*s.state)
	}
	p, o := s.key("candidate/parameters"), s.key("candidate/optimizer")
	for key, data := range map[string][]byte{p: params, o: optimizer} {
		if _, err := s.db.Set(key, tensor.Tensor{DType: tensor.Float32, Shape: []int{len(data) / 4}, Data: data}); err != nil {
			return model, state, err
		}
	}
	if err := s.db.SetStep(o, height); err != nil {
		return model, state, err
	}
	return s.keepState(height, p, o)
}

// A state that somebody fetches is kept for a lease after each request, so that
// who catches up gets a whole state, parameters and optimizer state, while the
// others train on; only so many, whatever is asked for.
const (
	lease     = 5 * time.Second
	maxLeased = 6 // the head's and its parent's among them, where these are fetched
)

// hasState reports whether the state of a record is here.
func (s *store) hasState(r round.Record) bool {
	params, opt := s.stateKeys(r)
	return s.db.Exists(params) && s.db.Exists(opt)
}

// retain drops all bodies but the states of these records and these averages.
// What is being read meanwhile is kept until that is done.
func (s *store) retain(states []round.Record, averages []treehash.Hash) {
	keep := make(map[string]bool, 2*len(states)+len(averages))
	for _, r := range states {
		params, opt := s.stateKeys(r)
		keep[params], keep[opt] = true, true
	}
	for _, h := range averages {
		keep[s.averageKey(h)] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for h := range s.pinned {
		keep[s.averageKey(h)] = true
	}
	kept := s.db.Keys(s.key("state/"))
	for _, state := range s.leases() {
		for _, key := range kept {
			if strings.HasPrefix(key, state) {
				keep[key] = true
			}
		}
	}
	for _, key := range slices.Concat(kept, s.db.Keys(s.key("average/"))) {
		if !keep[key] {
			s.db.Delete(key)
		}
	}
	for h, keys := range s.bodies {
		keys = slices.DeleteFunc(keys, func(key string) bool { return !keep[key] })
		if s.bodies[h] = keys; len(keys) == 0 {
			delete(s.bodies, h)
		}
	}
}

// leases returns the states that somebody fetches, as stateKey, those that were
// asked for last where there are many: who looks for one that is to be had asks
// for several first. s.mu is held.
func (s *store) leases() []string {
	now := time.Now()
	maps.DeleteFunc(s.served, func(_ string, at time.Time) bool { return now.Sub(at) > lease })
	states := slices.SortedFunc(maps.Keys(s.served), func(a, b string) int { return s.served[b].Compare(s.served[a]) })
	return states[:min(len(states), maxLeased)]
}

// serving reports whether somebody asked for a part of a state a moment ago.
func (s *store) serving(moment time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, at := range s.served {
		if time.Since(at) < moment {
			return true
		}
	}
	return false
}
