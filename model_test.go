package spirt

import (
	"bytes"
	"encoding/json"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/tensor"
)

// tinySpec is a network of 21 parameters.
var tinySpec = nn.Spec{Name: "tiny", Input: []int{1, 2, 2}, Classes: 2, Layers: []nn.LayerSpec{
	{Kind: nn.Flatten}, {Kind: nn.Linear, Out: 3}, {Kind: nn.ReLU}, {Kind: nn.Linear, Out: 2},
}}

func trainedOf(t testing.TB, spec nn.Spec) *Trained {
	t.Helper()
	model, err := nn.New(spec)
	check(t, err)
	trained := &Trained{Model: model, Parameters: make([]float32, model.NumParams()), Scale: 1.0 / 255, Offset: -0.1307}
	model.Init(trained.Parameters, 1)
	return trained
}

func tinyFile(t testing.TB) (*Trained, []byte) {
	t.Helper()
	trained := trainedOf(t, tinySpec)
	path := filepath.Join(t.TempDir(), modelFile)
	check(t, trained.Write(path))
	b, err := os.ReadFile(path)
	check(t, err)
	return trained, b
}

func decode(b []byte) (*Trained, error) { return decodeModel(bytes.NewReader(b), int64(len(b))) }

func TestModelFile(t *testing.T) {
	for _, name := range nn.Names() {
		want := trainedOf(t, specOf(t, name))
		path := filepath.Join(t.TempDir(), modelFile)
		check(t, want.Write(path))
		check(t, want.Write(path)) // replaces it
		got, err := ReadModel(path)
		check(t, err)
		a, _ := json.Marshal(got.Model.Spec())
		b, _ := json.Marshal(want.Model.Spec())
		if !bytes.Equal(a, b) || !slices.Equal(got.Parameters, want.Parameters) || got.Scale != want.Scale || got.Offset != want.Offset || got.Hash() != want.Hash() {
			t.Errorf("%s: another model was read than written", name)
		}
		if got.Hash() != treehash.Sum(tensor.Bytes(want.Parameters)) {
			t.Errorf("%s: the model hash is not that of the parameters' bytes", name)
		}
	}
}

// PyTorch's names, shapes and element type, as any reader of safetensors
// finds them.
func TestModelFileTensors(t *testing.T) {
	_, b := tinyFile(t)
	named, meta, err := tensor.ReadSafetensors(bytes.NewReader(b), int64(len(b)))
	check(t, err)
	shapes := map[string][]int{"fc1.weight": {3, 4}, "fc1.bias": {3}, "fc2.weight": {2, 3}, "fc2.bias": {2}}
	if len(named) != len(shapes) {
		t.Fatalf("%d tensors", len(named))
	}
	for _, n := range named {
		if !slices.Equal(n.Shape, shapes[n.Name]) || n.DType != tensor.Float32 {
			t.Errorf("%s has the shape %v and dtype %v", n.Name, n.Shape, n.DType)
		}
	}
	if want := []string{"format", metaArchitecture, metaModel, metaOffset, metaScale}; !slices.Equal(slices.Sorted(maps.Keys(meta)), want) {
		t.Errorf("the metadata has %v, want %v", slices.Sorted(maps.Keys(meta)), want)
	}
}

func TestModelFileTruncated(t *testing.T) {
	_, b := tinyFile(t)
	for n := range b {
		if _, err := decode(b[:n]); err == nil {
			t.Fatalf("a file of %d of %d bytes is accepted", n, len(b))
		}
	}
	if _, err := decode(append(slices.Clone(b), 0)); err == nil {
		t.Error("a byte too many is accepted")
	}
}

// Whatever byte is changed: the file is refused, or reads as the same
// parameters (a space of padding, a name of the network).
func TestModelFileFlipped(t *testing.T) {
	want, b := tinyFile(t)
	data := len(b) - 4*len(want.Parameters)
	for i := range b {
		for _, bits := range []byte{1, 0x20, 0x80, 0xff} {
			flipped := slices.Clone(b)
			flipped[i] ^= bits
			got, err := decode(flipped)
			switch {
			case err == nil && i >= data:
				t.Fatalf("byte %d of the parameters is changed, and nobody sees it", i-data)
			case err == nil && got.Hash() != want.Hash():
				t.Fatalf("byte %d: other parameters", i)
			}
		}
	}
}

// remade returns a model file with this change to its parts.
func remade(t testing.TB, change func(named []tensor.Named, meta map[string]string) []tensor.Named) []byte {
	t.Helper()
	_, b := tinyFile(t)
	named, meta, err := tensor.ReadSafetensors(bytes.NewReader(b), int64(len(b)))
	check(t, err)
	var out bytes.Buffer
	check(t, tensor.WriteSafetensors(&out, change(named, meta), meta))
	return out.Bytes()
}

func TestModelFileRefused(t *testing.T) {
	type parts = []tensor.Named
	by := func(named parts, name string) *tensor.Named {
		return &named[slices.IndexFunc(named, func(n tensor.Named) bool { return n.Name == name })]
	}
	layers := func(out string) string {
		return `{"name":"x","input":[1,2,2],"classes":2,"layers":[{"kind":"flatten"},{"kind":"linear","out":` + out + `},{"kind":"linear","out":2}]}`
	}
	for name, c := range map[string]struct {
		change func(named parts, meta map[string]string) parts
		says   []string
	}{
		"missing tensor": {func(n parts, m map[string]string) parts {
			return slices.DeleteFunc(n, func(n tensor.Named) bool { return n.Name == "fc2.bias" })
		}, []string{"fc2.bias", "[2]", "float32", "missing"}},
		"renamed tensor": {func(n parts, m map[string]string) parts { by(n, "fc1.weight").Name = "fc3.weight"; return n }, []string{"fc1.weight", "[3 4]", "missing"}},
		"wrong dtype":    {func(n parts, m map[string]string) parts { by(n, "fc1.bias").DType = tensor.Int32; return n }, []string{"fc1.bias", "float32"}},
		"wrong shape":    {func(n parts, m map[string]string) parts { by(n, "fc1.weight").Shape = []int{4, 3}; return n }, []string{"fc1.weight", "[3 4]"}},
		"shorter tensor": {func(n parts, m map[string]string) parts {
			v := by(n, "fc1.bias")
			v.Shape, v.Data = []int{2}, v.Data[:8]
			return n
		}, []string{"fc1.bias", "[3]"}},
		"NaN": {func(n parts, m map[string]string) parts {
			tensor.Floats(by(n, "fc1.bias").Data)[1] = float32(math.NaN())
			return n
		}, []string{"parameter 13", "not finite"}},
		"infinity": {func(n parts, m map[string]string) parts {
			tensor.Floats(by(n, "fc1.weight").Data)[0] = float32(math.Inf(-1))
			return n
		}, []string{"parameter 0", "not finite"}},
		"other parameter": {func(n parts, m map[string]string) parts { tensor.Floats(by(n, "fc1.weight").Data)[0] = 7; return n }, []string{"model hash", "damaged"}},
		"no hash":         {func(n parts, m map[string]string) parts { delete(m, metaModel); return n }, []string{"model hash", "damaged"}},
		"no architecture": {func(n parts, m map[string]string) parts { delete(m, metaArchitecture); return n }, []string{metaArchitecture, "not written by spirt"}},
		"no JSON":         {func(n parts, m map[string]string) parts { m[metaArchitecture] = "lenet5"; return n }, []string{metaArchitecture}},
		"no layers":       {func(n parts, m map[string]string) parts { m[metaArchitecture] = "{}"; return n }, []string{metaArchitecture}},
		"huge layer":      {func(n parts, m map[string]string) parts { m[metaArchitecture] = layers("1048576"); return n }, []string{"fc1.weight", "1048576", "missing"}},
		"too huge layer":  {func(n parts, m map[string]string) parts { m[metaArchitecture] = layers("1048577"); return n }, []string{metaArchitecture, "1048577", "1 to 1048576"}},
		"overflow": {func(n parts, m map[string]string) parts {
			m[metaArchitecture] = layers("9999999999999999999999")
			return n
		}, []string{metaArchitecture}},
		"too many layers": {func(n parts, m map[string]string) parts {
			m[metaArchitecture] = layers(`2}` + strings.Repeat(`,{"kind":"relu"}`, 300) + `,{"kind":"linear","out":2`)
			return n
		}, []string{metaArchitecture, "at most 256"}},
		"deep JSON":  {func(n parts, m map[string]string) parts { m[metaArchitecture] = strings.Repeat("[", 1<<20); return n }, []string{metaArchitecture}},
		"no scale":   {func(n parts, m map[string]string) parts { delete(m, metaScale); return n }, []string{metaScale, "finite"}},
		"NaN scale":  {func(n parts, m map[string]string) parts { m[metaScale] = "NaN"; return n }, []string{metaScale, "NaN", "finite"}},
		"big offset": {func(n parts, m map[string]string) parts { m[metaOffset] = "1e39"; return n }, []string{metaOffset, "1e39", "finite"}},
		"inf offset": {func(n parts, m map[string]string) parts { m[metaOffset] = "-Inf"; return n }, []string{metaOffset, "-Inf", "finite"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeTemp(t, modelFile, string(remade(t, c.change)))
			_, err := ReadModel(path)
			refused(t, err, append(c.says, path)...)
		})
	}
	if _, err := decode(remade(t, func(n parts, m map[string]string) parts { return n })); err != nil {
		t.Errorf("unchanged: %v", err)
	}
	_, err := ReadModel(filepath.Join(t.TempDir(), "none"))
	refused(t, err, "none")
	_, err = ReadModel(t.TempDir())
	refused(t, err)
}

// A small file does not get much memory, whatever it says.
func TestModelFileMemory(t *testing.T) {
	hostile := remade(t, func(n []tensor.Named, m map[string]string) []tensor.Named {
		m[metaArchitecture] = `{"name":"x","input":[1,1,250],"classes":2,"layers":[{"kind":"flatten"},{"kind":"linear","out":1048576},{"kind":"linear","out":2}]}`
		return n
	})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := decode(hostile)
	runtime.ReadMemStats(&after)
	refused(t, err, "missing")
	if got := after.TotalAlloc - before.TotalAlloc; got > 4<<20 {
		t.Errorf("%d bytes are allocated for a file of %d", got, len(hostile))
	}
}

func TestEvaluateByHand(t *testing.T) {
	trained := trainedOf(t, specOf(t, "logistic"))
	data, err := dataset.Open("mnist-10k")
	check(t, err)
	trained.Scale, trained.Offset = data.Scale, data.Offset
	rows := dataset.Range{Lo: 17, Hi: 17 + evalBatch + 3} // a whole batch and a rest
	accuracy, loss, err := trained.Evaluate(data, rows)
	check(t, err)
	ws := trained.Model.NewWorkspace(1)
	x := make([]float32, data.Stride())
	right, sum := 0, 0.0
	for i := rows.Lo; i < rows.Hi; i++ {
		data.Floats(x, dataset.Range{Lo: i, Hi: i + 1})
		l, c := trained.Model.Evaluate(trained.Parameters, x, []int32{int32(data.Labels[i])}, ws)
		sum, right = sum+l, right+c
	}
	if n := float64(rows.Len()); accuracy != float64(right)/n || math.Abs(loss-sum/n) > 1e-6 {
		t.Errorf("accuracy %v and loss %v, want %v and %v", accuracy, loss, float64(right)/n, sum/n)
	}
	if _, _, err := trained.Evaluate(data, dataset.Range{Lo: 5, Hi: 5}); err == nil {
		t.Error("no samples have an accuracy")
	}
	if _, _, err := trainedOf(t, tinySpec).Evaluate(data, rows); err == nil {
		t.Error("a network for other images has an accuracy")
	}
}

func FuzzReadModel(f *testing.F) {
	_, b := tinyFile(f)
	f.Add(b)
	f.Add(b[:len(b)-1])
	for _, spec := range []string{"{}", "[", `{"name":"x","input":[1,1,250],"classes":2,"layers":[{"kind":"flatten"},{"kind":"linear","out":1048576},{"kind":"linear","out":2}]}`} {
		f.Add(remade(f, func(n []tensor.Named, m map[string]string) []tensor.Named { m[metaArchitecture] = spec; return n }))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		trained, err := decode(b)
		if err != nil {
			return
		}
		if 4*len(trained.Parameters) > len(b) || tensor.NonFinite(trained.Parameters) >= 0 {
			t.Errorf("%d parameters of %d bytes", len(trained.Parameters), len(b))
		}
		if trained.Scale-trained.Scale != 0 || trained.Offset-trained.Offset != 0 {
			t.Errorf("scale %v, offset %v", trained.Scale, trained.Offset)
		}
	})
}
