//go:build !race && unix

package main

const clusterRounds = "300"
