package samebits

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// The model that follows from fixed gradients has these hashes on every CPU:
// what peers agree on is what each computes for itself. Another hash here
// means another arithmetic version of the jobs.
func TestModelOfFixedGradients(t *testing.T) {
	adam := optim.Config{Name: optim.Adam, LR: 0.002, Beta1: 0.9, Beta2: 0.999, Eps: 1e-8}
	momentum := optim.Config{Name: optim.SGD, LR: 0.05, Momentum: 0.9, WeightDecay: 1e-4}
	unequal := []uint32{3, 1, 2, 7}
	for _, test := range []struct {
		name    string
		c       optim.Config
		weights []uint32
		half    bool
		want    string
	}{
		{"adam", adam, nil, false, "40f37d4434eed1a431286994ac681fff 76c7720f89fa8cbe3cb625ddfbf0c420"},
		{"adam, unequal shares", adam, unequal, false, "ea7f2d8ae30f1933c7b6c179a74c2328 fc28cad1ec6f17a57080aba42829d212"},
		{"adam, unequal shares, float16", adam, unequal, true, "57ef2518ee262543c0deff85fe5077ae 6fe6f2406dfed54a86c284498f14a687"},
		{"sgd with momentum", momentum, nil, false, "7c2ef686372eed3703eae6506094a326 50adda296e2d483065c489c9024a6cb6"},
		{"sgd with momentum, float16", momentum, nil, true, "f564fde88877e515333b3aee4604df3c 07a7bd3fca29736c17d4ff07a4293738"},
		{"sgd with momentum, unequal shares", momentum, unequal, false, "d86c5630117e37128ae6fbc0027a3d81 ee519518a4e212daaa6f24bcbcfb5c03"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := modelOfFixedGradients(t, test.c, test.weights, test.half); got != test.want {
				t.Errorf("the model has the hash %s, want %s", got, test.want)
			}
		})
	}
}

// modelOfFixedGradients trains LeNet-5 from its initial parameters as a peer
// does: gradients of three minibatches make the average of each of four peers,
// the averages an aggregate, the aggregate an update. It returns the hashes of
// model and optimizer state.
func modelOfFixedGradients(t *testing.T, c optim.Config, weights []uint32, half bool) string {
	t.Helper()
	const peers, minibatches, rounds = 4, 3, 20
	spec, err := nn.Builtin("lenet5")
	if err != nil {
		t.Fatal(err)
	}
	m, err := nn.New(spec)
	if err != nil {
		t.Fatal(err)
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	db, err := tensordb.Open(tensordb.Config{})
	ok(err)
	defer db.Close()
	params := make([]float32, m.NumParams())
	m.Init(params, 1)
	_, err = db.Set("parameters", tensor.FromFloats([]int{len(params)}, params))
	ok(err)
	r := rand.New(rand.NewPCG(1, 2))
	gradient := make([]float32, len(params))
	for round := uint64(1); round <= rounds; round++ {
		averages := make([]string, peers)
		for p := range averages {
			averages[p] = fmt.Sprint("average/", p)
			ok(db.Accumulator("sum", len(gradient), minibatches, minibatches))
			for b := range minibatches {
				for i := range gradient {
					// Exact, and of many magnitudes.
					gradient[i] = float32(int32(r.Uint32())) / float32(uint64(1)<<(32+r.UintN(12)))
				}
				_, err := db.Accumulate("sum", b, gradient)
				ok(err)
			}
			_, err := db.Average(averages[p], "sum")
			ok(err)
			if half {
				ok(db.Half(averages[p]+"/half", averages[p]))
				averages[p] += "/half"
			}
		}
		ok(db.Mean("aggregate", averages, weights))
		_, err := db.Update(tensordb.UpdateKeys{Params: "parameters", State: "optimizer", Gradient: "aggregate"}, round, c)
		ok(err)
	}
	model, err := db.Hash("parameters")
	ok(err)
	state, err := db.Hash("optimizer")
	ok(err)
	return model.String()[:32] + " " + state.String()[:32]
}
