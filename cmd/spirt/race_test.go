//go:build race && unix

package main

// clusterRounds take as long as the commands that are given meanwhile: with the
// race detector rounds are slow.
const clusterRounds = "120"
