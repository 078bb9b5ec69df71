package tensordb

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// trainable returns a database with a model, its parameters and samples that
// can be told apart.
func trainable(t *testing.T, config Config) (*DB, Samples) {
	t.Helper()
	db := open(t, config)
	spec, err := nn.Builtin("logistic")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := db.SetModel("model", spec); err != nil || n != 7850 {
		t.Fatal(n, err)
	}
	if err := db.InitModel("p", "model", 3); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	const samples = 200
	images, labels := make([]byte, samples*784), make([]byte, samples)
	for i := range labels {
		labels[i] = byte(i % 10)
		for j := range 784 {
			images[i*784+j] = byte(rng.IntN(60))
			if j/78 == int(labels[i]) {
				images[i*784+j] += 150
			}
		}
	}
	for key, x := range map[string]tensor.Tensor{
		"x": {DType: tensor.Uint8, Shape: []int{samples, 1, 28, 28}, Data: images}, "y": {DType: tensor.Uint8, Shape: []int{samples}, Data: labels},
	} {
		if _, err := db.Set(key, x); err != nil {
			t.Fatal(err)
		}
	}
	return db, Samples{Model: "model", Params: "p", Images: "x", Labels: "y", Scale: 1.0 / 128, Offset: -1}
}

func rowsUpTo(n int) []int {
	rows := make([]int, n)
	for i := range rows {
		rows[i] = i
	}
	return rows
}

// A step in the database is what gradient, average and update are apart.
func TestTrainIsGradientAndUpdate(t *testing.T) {
	db, s := trainable(t, Config{})
	s.Rows = rowsUpTo(64)
	c := optim.Config{Name: optim.Adam, LR: 0.01}
	if err := db.Copy("q", "p"); err != nil {
		t.Fatal(err)
	}
	apart := s
	apart.Params = "q"
	for step := uint64(1); step <= 3; step++ {
		acc := fmt.Sprint("acc", step)
		if err := db.Accumulator(acc, 7850, 1, 1); err != nil {
			t.Fatal(err)
		}
		score, status, err := db.Gradient(apart, acc, 0)
		if err != nil || status != Counted || score.Samples != 64 || !(score.Loss > 0) {
			t.Fatal(score, status, err)
		}
		if again, status, err := db.Gradient(apart, acc, 0); err != nil || status != Duplicate || again.Samples != 0 {
			t.Error(again, status, err)
		}
		if _, err := db.Average("g", acc); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Update(UpdateKeys{Params: "q", State: "r", Gradient: "g"}, step, c); err != nil {
			t.Fatal(err)
		}
		trained, applied, err := db.Train(s, "s", step, c)
		if err != nil || !applied || trained != score {
			t.Fatal(trained, applied, err)
		}
		if _, applied, err := db.Train(s, "s", step, c); err != nil || applied {
			t.Error("applied again", err)
		}
		for _, keys := range [][2]string{{"p", "q"}, {"s", "r"}} {
			a, err := db.Hash(keys[0])
			b, err2 := db.Hash(keys[1])
			if err != nil || err2 != nil || a != b {
				t.Errorf("step %d: %v differ (%v, %v)", step, keys, err, err2)
			}
		}
	}
	_, _, err := db.Train(s, "s", 5, c)
	wantError(t, err, ErrOutOfRange)
}

func TestTrainLearns(t *testing.T) {
	db, s := trainable(t, Config{})
	before, err := db.Evaluate(s)
	if err != nil || before.Samples != 200 {
		t.Fatal(before, err)
	}
	for step := uint64(1); step <= 40; step++ {
		s.Rows = rowsUpTo(200)[20*int(step%10) : 20*int(step%10)+20]
		if _, _, err := db.Train(s, "s", step, optim.Config{Name: optim.SGD, LR: 0.05, Momentum: 0.9}); err != nil {
			t.Fatal(err)
		}
	}
	s.Rows = nil
	after, err := db.Evaluate(s)
	if err != nil || after.Loss > before.Loss/2 || after.Correct < 190 {
		t.Errorf("before %+v, after %+v, %v", before, after, err)
	}
}

func TestTrainRefuses(t *testing.T) {
	db, good := trainable(t, Config{})
	used := db.Stats().MemoryUsed
	if err := db.Accumulator("acc", 7850, 2, 2); err != nil {
		t.Fatal(err)
	}
	if err := db.Accumulator("small", 3, 2, 2); err != nil {
		t.Fatal(err)
	}
	nan := numbers(7850, func(int) float32 { return 1e38 })
	set(t, db, "wild", nan)
	good.Rows = rowsUpTo(8)
	for name, c := range map[string]struct {
		change func(*Samples)
		acc    string
		err    error
	}{
		"no model":          {func(s *Samples) { s.Model = "none" }, "acc", ErrNoKey},
		"not a model":       {func(s *Samples) { s.Model = "y" }, "acc", ErrWrongType},
		"no parameters":     {func(s *Samples) { s.Params = "none" }, "acc", ErrNoKey},
		"other parameters":  {func(s *Samples) { s.Params = "x" }, "acc", ErrWrongType},
		"no images":         {func(s *Samples) { s.Images = "none" }, "acc", ErrNoKey},
		"images as labels":  {func(s *Samples) { s.Labels = "x" }, "acc", ErrWrongType},
		"float images":      {func(s *Samples) { s.Images = "p" }, "acc", ErrWrongType},
		"a row beyond":      {func(s *Samples) { s.Rows = []int{200} }, "acc", ErrOutOfRange},
		"no rows":           {func(s *Samples) { s.Rows = nil }, "acc", ErrOutOfRange},
		"too many rows":     {func(s *Samples) { s.Rows = make([]int, 4097) }, "acc", ErrOutOfRange},
		"no scale":          {func(s *Samples) { s.Scale = 0 }, "acc", ErrOutOfRange},
		"no accumulator":    {func(*Samples) {}, "none", ErrNoKey},
		"other accumulator": {func(*Samples) {}, "small", ErrOutOfRange},
		"wild parameters":   {func(s *Samples) { s.Params = "wild" }, "acc", ErrNotFinite},
	} {
		s := good
		c.change(&s)
		if _, _, err := db.Gradient(s, c.acc, 0); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			wantError(t, err, c.err)
		}
	}
	if _, status, err := db.Gradient(good, "acc", 0); err != nil || status != Counted {
		t.Error(status, err)
	}
	// Memory that the engine keeps is counted.
	if db.Stats().MemoryUsed <= used {
		t.Error("the engine's memory is not counted")
	}
	small, s := trainable(t, Config{MaxMemory: 400_000})
	s.Rows = make([]int, 4096)
	if _, _, err := small.Train(s, "s", 1, optim.Config{Name: optim.SGD, LR: 1}); err == nil {
		t.Error("a minibatch that is larger than the memory")
	} else {
		wantError(t, err, ErrMemory)
	}
	for _, text := range []string{"", "lenet6", "{}", `{"name":"x","input":[1,28,28],"classes":10,"layers":[{"kind":"linear","out":10}],"more":1}`, `{"name":"x"} {}`} {
		if spec, err := readModel([]byte(text)); err == nil {
			if _, err := db.SetModel("m", spec); err == nil {
				t.Errorf("the model %q is accepted", text)
			}
		}
	}
}

// What a few words ask for takes no memory where it cannot be right, whatever
// the limit.
func TestTrainBoundsMemory(t *testing.T) {
	db, s := trainable(t, Config{})
	const wide = 8 << 20
	if _, err := db.Set("wide", tensor.Tensor{DType: tensor.Uint8, Shape: []int{1, wide}, Data: make([]byte, wide)}); err != nil {
		t.Fatal(err)
	}
	if err := db.Accumulator("acc", 7850, 1, 1); err != nil {
		t.Fatal(err)
	}
	big := nn.Spec{Name: "big", Input: []int{1, 1024, 1024}, Classes: 2, Layers: []nn.LayerSpec{{Kind: nn.Flatten}, {Kind: nn.Linear, Out: 2}}}
	params, err := db.SetModel("big", big)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Accumulator("bigacc", params, 1, 1); err != nil {
		t.Fatal(err)
	}
	s.Rows = make([]int, maxTrainRows)
	for name, c := range map[string]struct {
		change func(*Samples)
		acc    string
		err    error
	}{
		"wide images": {func(s *Samples) { s.Images = "wide" }, "acc", ErrWrongType},
		"wide labels": {func(s *Samples) { s.Labels = "wide" }, "acc", ErrWrongType},
		"large model": {func(s *Samples) { s.Model = "big" }, "bigacc", ErrOutOfRange},
	} {
		s := s
		c.change(&s)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := db.Gradient(s, c.acc, 0)
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		wantError(t, err, c.err)
		if taken := after.TotalAlloc - before.TotalAlloc; taken > 128<<20 {
			t.Errorf("%s: %d bytes were taken", name, taken)
		}
	}
}

func TestTrainCommands(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{})
	c := dial(t, socket, adminToken)
	k := func(name string) string { return testPrefix + name }
	if n := do(t, c, "TENSOR.MODEL", k("model"), "logistic"); n.Int != 7850 {
		t.Errorf("%d parameters", n.Int)
	}
	do(t, c, "TENSOR.INIT", k("p"), k("model"), 1)
	do(t, c, "TENSOR.SET", k("x"), "uint8", 2, 4, 784, strings.Repeat("ab", 2*784))
	do(t, c, "TENSOR.SET", k("y"), "uint8", 1, 4, "\x00\x01\x02\x03")
	do(t, c, "TENSOR.ACCUMULATOR", k("acc"), 7850, 2, 2)
	r := do(t, c, "TENSOR.GRADIENT", k("acc"), k("model"), k("p"), k("x"), k("y"), 1, "0.01", "-1", 2, 3)
	if len(r.Elems) != 4 || r.Elems[2].Int != 2 || string(r.Elems[3].Bytes) != "BUFFERED" {
		t.Errorf("%+v", r)
	}
	r = do(t, c, "TENSOR.EVALUATE", k("model"), k("p"), k("x"), k("y"), "0.01", "-1")
	if len(r.Elems) != 3 || r.Elems[2].Int != 4 {
		t.Errorf("%+v", r)
	}
	train := []any{"TENSOR.TRAIN", k("p"), k("s"), k("model"), k("x"), k("y"), "0.01", "-1", 2, 0, 1, "STEP", 1, "ADAM", "LR", "0.1"}
	for want := int64(1); want >= 0; want-- {
		if r = do(t, c, train...); len(r.Elems) != 4 || r.Elems[3].Int != want {
			t.Errorf("%+v", r)
		}
	}
	train[8] = 3
	wantCode(t, c, "ERR", train...)
	wantCode(t, c, "WRONGTYPE", "TENSOR.MODEL", k("m"), "no model")
	wantCode(t, c, "OUTOFRANGE", "TENSOR.EVALUATE", k("model"), k("p"), k("x"), k("y"), "0.01", "-1", 4)
}
