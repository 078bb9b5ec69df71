package nn

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"testing"
)

func TestBuiltin(t *testing.T) {
	params := map[string]int{"logistic": 7850, "mlp": 235146, "lenet5": 61706, "cnn": 454922}
	if len(Names()) != len(params) {
		t.Errorf("names are %v", Names())
	}
	for name, want := range params {
		spec, err := Builtin(name)
		if err != nil {
			t.Fatal(err)
		}
		m, err := New(spec)
		if err != nil {
			t.Fatal(err)
		}
		if m.NumParams() != want || m.NumBuffers() != 0 || m.InputLen() != 784 {
			t.Errorf("%s has %d parameters, want %d", name, m.NumParams(), want)
		}
		data, err := json.Marshal(m.Spec())
		if err != nil {
			t.Fatal(err)
		}
		var back Spec
		if err := json.Unmarshal(data, &back); err != nil || !reflect.DeepEqual(back, spec) {
			t.Errorf("%s: JSON gives %v, %v", name, back, err)
		}
	}
	for name, nearest := range map[string]string{"lenet": "lenet5", "LeNet-5": "lenet5", "mpl": "mlp", "cnn2": "cnn", "": "cnn"} {
		_, err := Builtin(name)
		if err == nil || !strings.Contains(err.Error(), "have "+nearest+",") {
			t.Errorf("Builtin(%q): %v; want %s first", name, err, nearest)
		}
	}
}

func TestViews(t *testing.T) {
	spec, _ := Builtin("lenet5")
	m, err := New(spec)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"}
	at := 0
	for i, v := range m.Views() {
		if v.Name != want[i] || v.Offset != at {
			t.Errorf("view %d is %s at %d, want %s at %d", i, v.Name, v.Offset, want[i], at)
		}
		at += v.Len()
	}
	if at != m.NumParams() {
		t.Errorf("views cover %d of %d parameters", at, m.NumParams())
	}
}

func TestInit(t *testing.T) {
	spec, _ := Builtin("lenet5")
	m, _ := New(spec)
	a, b, other := make([]float32, m.NumParams()), make([]float32, m.NumParams()), make([]float32, m.NumParams())
	m.Init(a, 1)
	m.Init(b, 1)
	m.Init(other, 2)
	if !reflect.DeepEqual(a, b) || reflect.DeepEqual(a, other) {
		t.Error("Init does not follow its seed")
	}
	for i, v := range m.Views() {
		bound := 1 / math.Sqrt(float64(m.fanIn[i]))
		most, sum := 0.0, 0.0
		for _, p := range v.Of(a) {
			most, sum = max(most, math.Abs(float64(p))), sum+float64(p)
		}
		if most > bound || v.Len() > 100 && (most < 0.9*bound || math.Abs(sum) > 3*bound*math.Sqrt(float64(v.Len()))) {
			t.Errorf("%s: values to %v, sum %v; the bound is %v", v.Name, most, sum, bound)
		}
	}
	// The same bits on every CPU: these were written down on amd64.
	for i, want := range map[int]uint32{0: 0x3d856573, 1: 0xbdfa5776, 61705: 0x3d6c27f2} {
		if got := math.Float32bits(a[i]); got != want {
			t.Errorf("parameter %d is %#x, want %#x", i, got, want)
		}
	}
}

func TestValidate(t *testing.T) {
	fc := func(out int) LayerSpec { return LayerSpec{Kind: Linear, Out: out} }
	flat := LayerSpec{Kind: Flatten}
	mnist := []int{1, 28, 28}
	many := func(l LayerSpec, n int) (all []LayerSpec) {
		for range n {
			all = append(all, l)
		}
		return append(all, flat, fc(10))
	}
	for want, s := range map[string]Spec{
		"input has 2 sizes":                    {Input: []int{1, 2}, Classes: 10, Layers: []LayerSpec{flat, fc(10)}},
		"input size 2 is -1":                   {Input: []int{1, -1, 2}, Classes: 10, Layers: []LayerSpec{flat, fc(10)}},
		"too large, at most":                   {Input: []int{1 << 20, 1 << 20, 1 << 20}, Classes: 10, Layers: []LayerSpec{flat, fc(10)}},
		"classes is 1":                         {Input: mnist, Classes: 1, Layers: []LayerSpec{flat, fc(1)}},
		"no layers":                            {Input: mnist, Classes: 10},
		"layers, at most 256":                  {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: ReLU}, 300)},
		"layers of one sample take more":       {Input: []int{64, 200, 200}, Classes: 10, Layers: many(LayerSpec{Kind: ReLU}, 10)},
		`layer 1 ("dense"): unknown kind`:      {Input: mnist, Classes: 10, Layers: []LayerSpec{{Kind: "dense"}}},
		"put a flatten layer before":           {Input: mnist, Classes: 10, Layers: []LayerSpec{fc(10)}},
		"put it before the flatten":            {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, {Kind: MaxPool, Kernel: 2}, fc(10)}},
		"kernel is 16":                         {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: Conv2D, Out: 1, Kernel: 16}, 1)},
		"stride is -1":                         {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: Conv2D, Out: 1, Kernel: 1, Stride: -1}, 1)},
		"padding is 2, want 0 to 1":            {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: MaxPool, Kernel: 2, Padding: 2}, 1)},
		"out is 0":                             {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: Conv2D, Kernel: 2}, 1)},
		"out is for":                           {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: ReLU, Out: 2}, 1)},
		"kernel, stride and padding are for":   {Input: mnist, Classes: 10, Layers: many(LayerSpec{Kind: ReLU, Kernel: 2}, 1)},
		"more than 268435456 weights":          {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, fc(1 << 20), fc(10)}},
		"more than 268435456 parameters":       {Input: []int{1, 64, 64}, Classes: 10, Layers: []LayerSpec{flat, fc(65000), fc(4000), fc(10)}},
		"the last layer is relu":               {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, fc(10), {Kind: ReLU}}},
		"no linear layer":                      {Input: mnist, Classes: 10, Layers: []LayerSpec{flat}},
		"has 9 outputs, but there are 10":      {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, fc(9)}},
		`the name "a" is taken`:                {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, {Kind: Linear, Name: "a", Out: 9}, {Kind: Linear, Name: "a", Out: 10}}},
		"may only have letters":                {Input: mnist, Classes: 10, Layers: []LayerSpec{flat, {Kind: Linear, Name: "a b", Out: 10}}},
		"no parameters to name":                {Input: mnist, Classes: 10, Layers: []LayerSpec{{Kind: Flatten, Name: "a"}, fc(10)}},
		"the name has 100 bytes":               {Name: strings.Repeat("x", 100), Input: mnist, Classes: 10, Layers: []LayerSpec{flat, fc(10)}},
		"a window of 5 does not fit into 3x28": {Input: []int{1, 3, 28}, Classes: 10, Layers: many(LayerSpec{Kind: Conv2D, Out: 1, Kernel: 5}, 1)},
	} {
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

// FuzzSpec reads a hostile Spec and, if it is valid and small, computes with it.
func FuzzSpec(f *testing.F) {
	for _, name := range Names() {
		spec, _ := Builtin(name)
		data, _ := json.Marshal(spec)
		f.Add(data)
	}
	for _, spec := range layerSpecs() {
		data, _ := json.Marshal(spec)
		f.Add(data)
	}
	f.Add([]byte(`{"input":[4611686018427387904,4,4],"classes":9223372036854775807,"layers":[{"kind":"linear","out":-9223372036854775808}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec Spec
		if json.Unmarshal(data, &spec) != nil {
			return
		}
		if err := spec.Validate(); err != nil {
			if len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
			return
		}
		if spec.Input[0]*spec.Input[1]*spec.Input[2] > 1<<12 || len(spec.Layers) > 16 {
			return
		}
		m, err := New(spec)
		if err != nil {
			t.Fatal(err)
		}
		if m.NumParams() > 1<<18 || m.WorkspaceSize(2) > 1<<24 {
			return
		}
		r := rand.New(rand.NewPCG(1, 2))
		m, params, x, labels := sample(t, r, spec, 2)
		loss, _ := m.Gradient(make([]float32, len(params)), params, x, labels, m.NewWorkspace(2))
		if !(loss >= 0) || math.IsInf(loss, 0) {
			t.Errorf("loss is %v", loss)
		}
	})
}

func TestNotFinite(t *testing.T) {
	spec, _ := Builtin("lenet5")
	r := rand.New(rand.NewPCG(3, 3))
	m, params, x, labels := sample(t, r, spec, 3)
	ws := m.NewWorkspace(3)
	grad := make([]float32, len(params))
	x[1000] = float32(math.NaN())
	if loss, _ := m.Gradient(grad, params, x, labels, ws); loss == loss {
		t.Errorf("loss is %v in spite of a NaN in x", loss)
	}
	if grad[len(grad)-1] == grad[len(grad)-1] {
		t.Error("the gradient hides a NaN in x")
	}
	// And it leaves nothing behind.
	x[1000] = 1
	again := make([]float32, len(params))
	loss, _ := m.Gradient(grad, params, x, labels, ws)
	fresh, _ := m.Gradient(again, params, x, labels, m.NewWorkspace(3))
	if loss != fresh || !reflect.DeepEqual(grad, again) {
		t.Error("a NaN in one batch changes the next")
	}
}

func TestEvaluateInParts(t *testing.T) {
	spec, _ := Builtin("lenet5")
	m, params, x, labels := sample(t, rand.New(rand.NewPCG(4, 4)), spec, 11)
	loss, correct := m.Evaluate(params, x, labels, m.NewWorkspace(11))
	parts, correctInParts := m.Evaluate(params, x, labels, m.NewWorkspace(4))
	if math.Abs(loss-parts) > 1e-9 || correct != correctInParts {
		t.Errorf("loss %v, %d correct; in parts %v, %d", loss, correct, parts, correctInParts)
	}
	if loss, correct := m.Evaluate(params, nil, nil, m.NewWorkspace(4)); loss != 0 || correct != 0 {
		t.Error("an empty evaluation is not zero")
	}
}

// TestConcurrent shares one Model between goroutines; it is for -race.
func TestConcurrent(t *testing.T) {
	spec, _ := Builtin("lenet5")
	m, params, x, labels := sample(t, rand.New(rand.NewPCG(5, 5)), spec, 4)
	var wg sync.WaitGroup
	grads := make([][]float32, 4)
	for i := range grads {
		grads[i] = make([]float32, len(params))
		wg.Go(func() { m.Gradient(grads[i], params, x, labels, m.NewWorkspace(4)) })
	}
	wg.Wait()
	for _, g := range grads[1:] {
		if !reflect.DeepEqual(g, grads[0]) {
			t.Error("concurrent gradients differ")
		}
	}
}

func TestWorkspace(t *testing.T) {
	for name, most := range map[string]int64{"lenet5": 4 << 20, "cnn": 16 << 20} {
		spec, _ := Builtin(name)
		m, params, x, labels := sample(t, rand.New(rand.NewPCG(6, 6)), spec, 64)
		if size := m.WorkspaceSize(64); size > most {
			t.Errorf("%s: a workspace for 64 samples takes %d bytes, want at most %d", name, size, most)
		} else {
			t.Logf("%s: %d bytes", name, size)
		}
		ws, grad := m.NewWorkspace(64), make([]float32, len(params))
		// Of several, since one that the runtime makes by the way does not count.
		if n := testing.AllocsPerRun(4, func() { m.Gradient(grad, params, x, labels, ws); m.Evaluate(params, x, labels, ws) }); n != 0 {
			t.Errorf("%s: Gradient and Evaluate allocate %v times", name, n)
		}
	}
}

func TestPanics(t *testing.T) {
	spec, _ := Builtin("logistic")
	m, params, x, labels := sample(t, rand.New(rand.NewPCG(7, 7)), spec, 2)
	grad, ws := make([]float32, len(params)), m.NewWorkspace(2)
	other, _ := New(spec)
	for want, f := range map[string]func(){
		"nn: params has the wrong length":                     func() { m.Gradient(grad, params[1:], x, labels, ws) },
		"nn: grad has the wrong length":                       func() { m.Gradient(grad[1:], params, x, labels, ws) },
		"nn: x has the wrong length":                          func() { m.Gradient(grad, params, x[1:], labels, ws) },
		"nn: label 10 is outside 0 to 9":                      func() { m.Gradient(grad, params, x, []int32{1, 10}, ws) },
		"nn: label -1 is outside 0 to 9":                      func() { m.Evaluate(params, x, []int32{1, -1}, ws) },
		"nn: workspace belongs to another model":              func() { other.Evaluate(params, x, labels, ws) },
		"nn: the batch is empty or larger than the workspace": func() { m.Gradient(grad, params, nil, nil, ws) },
		"nn: workspace for an empty batch":                    func() { m.NewWorkspace(0) },
	} {
		func() {
			defer func() {
				if got := recover(); got != want {
					t.Errorf("panics with %v, want %q", got, want)
				}
			}()
			f()
		}()
	}
}
