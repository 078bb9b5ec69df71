// Package nn is SPIRT's native engine: it computes losses and gradients of
// small feed-forward networks on one thread, without cgo and without hidden
// memory.
//
// Take a Spec (Builtin returns one by name, or unmarshal it from JSON), make a
// Model of it with New, give the Model a Workspace and call Gradient:
//
//	spec, err := nn.Builtin("lenet5")
//	model, err := nn.New(spec)
//	params := make([]float32, model.NumParams())
//	model.Init(params, seed)
//	ws := model.NewWorkspace(64)
//	loss, correct := model.Gradient(grad, params, x, labels, ws)
//
// All parameters lie in one flat vector, in the order and with the names of a
// PyTorch state_dict; Views tells where each lies. Images come as batch x
// channels x height x width.
//
// A Model is immutable and safe for concurrent use. A Workspace belongs to one
// goroutine at a time: it holds all scratch memory, so Gradient and Evaluate
// allocate nothing. Init gives the same bits on every CPU. Gradients may
// differ in their last bits between CPUs, and are the same from run to run on
// one.
//
// Limits: convolutions and pooling come before the flatten layer, kernels are
// square, and the loss is softmax cross-entropy. A Spec is bounded (see
// Validate), since it comes from files and from other machines.
package nn
