// Package samebits holds no code but tests: that the model that follows from
// gradients has the same bits on every CPU. Few imports keep it quick to build
// for others.
package samebits
